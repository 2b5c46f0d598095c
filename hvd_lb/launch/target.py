"""Where a run is to run: what the user said, else what a scheduler left behind, else this machine."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import MPIJOB_HOSTFILE, Host, is_this_machine, parse_hosts, read_hostfile
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.preflight.discovery import discovered
from hvd_lb.launch.starters import allocation as slurm
from hvd_lb.launch.starters.batch_systems import batch_job
from hvd_lb.machine.placement import NAME_MORE

_NAMES_SECONDS = 60.0

TargetKind = Literal["local", "ssh", "slurm", "submit-slurm", "submit-kubernetes"]


@dataclass(frozen=True)
class Target:
    """What it is, and its hosts; `how` says where they were found, `more` how to get more machines or GPUs."""

    kind: TargetKind
    hosts: list[Host] = field(default_factory=list)
    how: str = ""
    more: str = NAME_MORE
    gpus: int = 0  #: that a Slurm job has on each of its nodes


def find_target(
    options: LaunchOptions, device: Literal["auto", "cpu", "cuda"], environment: Mapping[str, str]
) -> Target:
    """`environment` is this process's. UserError for options that contradict each other, or name no host."""
    named = named_target(options)
    if named and options.launcher not in ("auto", "ssh"):
        raise UserError(
            f"--launcher {options.launcher} finds its own hosts: leave --hosts, --hostfile and --host-discovery out"
        )
    if named:
        return named
    if options.launcher == "kubernetes":
        return Target("submit-kubernetes")
    if options.launcher in ("auto", "slurm") and (job := slurm.allocation(device, environment)):
        how = f"Slurm job {environment['SLURM_JOB_ID']}"
        # One node that this process is on already needs no srun.
        if options.launcher == "auto" and len(job.nodes) == 1 and "SLURMD_NODENAME" in environment:
            return Target("local", how=how, more=slurm.MORE_GPUS)
        hosts = [Host(name, slots) for name, slots in job.nodes]
        return Target("slurm", hosts, how, slurm.MORE_GPUS, job.gpus)
    if options.launcher == "slurm":
        return Target("submit-slurm")
    if options.launcher != "local":
        if MPIJOB_HOSTFILE.exists():
            hosts = read_hostfile(MPIJOB_HOSTFILE)
            wait_for_names([host.name for host in hosts], _NAMES_SECONDS)
            return Target("ssh", hosts, f"MPIJob, {MPIJOB_HOSTFILE}")
        if batch := batch_job(environment):
            hosts, how = batch
            here = len(hosts) == 1 and options.launcher == "auto" and is_this_machine(hosts[0].name)
            return Target("local", how=how) if here else Target("ssh", hosts, how)
    if options.launcher == "ssh":
        raise UserError("--launcher ssh, but no hosts are named: give --hosts h1:8,h2:8 or --hostfile FILE")
    return Target("local")


def wait_for_names(names: list[str], seconds: float) -> None:
    """Until all names have addresses: those of new pods take a while. The preflight tells which have none."""
    end = time.monotonic() + seconds
    while names and time.monotonic() < end:
        try:
            socket.gethostbyname(names[-1])
        except OSError:
            time.sleep(1.0)
        else:
            names = names[:-1]


def named_target(options: LaunchOptions) -> Target | None:
    """The hosts that the user named, if any."""
    named = {
        "--hosts": options.hosts,
        "--hostfile": options.hostfile,
        "--host-discovery": options.host_discovery,
    }
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} are {'both' if len(given) == 2 else 'all'} given: give one of them"
        )
    if options.hosts is not None:
        return Target("ssh", parse_hosts(options.hosts), "--hosts")
    if options.hostfile is not None:
        return Target("ssh", read_hostfile(options.hostfile), f"--hostfile {options.hostfile}")
    if options.host_discovery is not None:
        script = options.host_discovery.expanduser().absolute()
        return Target("ssh", discovered(script), f"--host-discovery {options.host_discovery}")
    return None
