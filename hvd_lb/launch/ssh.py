"""Other machines over ssh: the command lines of a job, and one question asked of many hosts at once."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from hvd_lb.errors import UserError
from hvd_lb.launch.allreduce import needs_mpi
from hvd_lb.launch.hosts import assign
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.start import Launch, horovodrun_command

if TYPE_CHECKING:
    from hvd_lb.launch.preflight import Cluster

Reach = Callable[[str, Sequence[str]], list[str]]
"""Gives the command line that runs a command on a host, reading and writing what that reads and writes."""

_CONNECT_SECONDS = 10
# Without these, the processes of a host that went away would be waited for until TCP gives up, two hours.
_ALIVE_SECONDS, _ALIVE_COUNT = 15, 4
SSH_FAILED = 255  # its own exit code, not that of the command


def ssh_command(options: LaunchOptions) -> list[str]:
    """ssh with what a run needs of it; a host's name and a command line for its shell follow."""
    command = [
        *("ssh", "-o", "BatchMode=yes"),
        *("-o", f"StrictHostKeyChecking={'yes' if options.strict_host_keys else 'accept-new'}"),
        *("-o", f"ConnectTimeout={_CONNECT_SECONDS}"),
        *("-o", f"ServerAliveInterval={_ALIVE_SECONDS}", "-o", f"ServerAliveCountMax={_ALIVE_COUNT}"),
    ]
    if options.ssh_port is not None:
        command += ["-p", str(options.ssh_port)]
    if options.ssh_key is not None:
        command += ["-i", str(options.ssh_key.expanduser().absolute())]
    return command


def over_ssh(
    cluster: Cluster, processes: int, options: LaunchOptions, environment: Mapping[str, str]
) -> Launch:
    """`processes` on the hosts of a cluster, by horovodrun: over Gloo, or Open MPI where the allreduce needs it."""
    hosts = assign(cluster.hosts, processes)
    ssh = ssh_command(options)
    interfaces, mpi_arguments = [cluster.interface], None
    if needs_mpi(environment):
        # mpirun takes one list for all hosts, in which a name that a host does not have is passed over.
        interfaces = sorted({cluster.interface, *(cluster.interfaces[host.name] for host in hosts)})
        mpi_arguments = mpirun_arguments(ssh, interfaces)
    return Launch(
        "ssh",
        hosts,
        lambda job_file: horovodrun_command(
            hosts,
            job_file,
            address=cluster.address,
            interfaces=interfaces,
            ssh=ssh,
            mpi_arguments=mpi_arguments,
        ),
        interfaces={host.name: cluster.interfaces[host.name] for host in hosts},
        environment=environment,
    )


def mpirun_arguments(ssh: Sequence[str], interfaces: Sequence[str]) -> str:
    """What horovodrun hands on to mpirun, for a shell: how to log in, and the interface of its own connections."""
    if any(len(word.split()) != 1 for word in ssh):
        raise UserError(
            f"mpirun cannot be given {shlex.join(ssh)}: name an --ssh-key without spaces in its path"
        )
    return shlex.join(
        [
            *("--mca", "plm_rsh_agent", "ssh", "--mca", "plm_rsh_args", " ".join(ssh[1:])),
            *("--mca", "oob_tcp_if_include", ",".join(interfaces)),
            *("--mca", "mpi_yield_when_idle", "1"),  # more processes than cores are common on the CPU
        ]
    )


def on_host(ssh: Sequence[str], host: str, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on `host`; without ssh when that is this machine."""
    return list(command) if is_this_machine(host) else [*ssh, host, shlex.join(command)]


def reach_over_ssh(options: LaunchOptions) -> Reach:
    return partial(on_host, ssh_command(options))


def is_this_machine(host: str) -> bool:
    """Whether a name or address is this machine's own: only then can a socket be bound to it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def ask_all(
    commands: dict[str, list[str]], question: str, seconds: float
) -> dict[str, subprocess.CompletedProcess[str] | None]:
    """Run one command per host, all at once, with the question on stdin; None for one that did not end in time."""

    def ask(host: str) -> subprocess.CompletedProcess[str] | None:
        try:
            return subprocess.run(
                commands[host], input=question, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return None

    with ThreadPoolExecutor(max_workers=min(64, len(commands))) as pool:
        return dict(zip(commands, pool.map(ask, commands), strict=True))


def explain_failure(host: str, run: subprocess.CompletedProcess[str] | None, options: LaunchOptions) -> str:
    """Why a host gave no answer, and what to do, in one line."""
    if run is None:
        return "no answer in time: is it up, and are its file systems?"
    at = f" on port {options.ssh_port}" if options.ssh_port is not None else ""
    meanings = (
        ("Could not resolve hostname", "no such host: check its name, or put it into /etc/hosts"),
        ("Permission denied", f"key refused{at}: ssh-copy-id {host}, or name another key with --ssh-key"),
        ("Too many authentication failures", f"key refused{at}: name the right one with --ssh-key"),
        (
            "IDENTIFICATION HAS CHANGED",
            f"its host key is another than in known_hosts: if it was set up anew, ssh-keygen -R {host}",
        ),
        (
            "Host key verification failed",
            f"its host key is not in known_hosts: log in once by hand (ssh {host}), or leave --strict-host-keys out",
        ),
        ("Connection refused", f"no sshd answers{at}: start one there, or name its port with --ssh-port"),
        ("timed out", f"no answer{at}: is it up, and does a firewall let ssh through?"),
        ("No route to host", "no route to it: is it up, and in this network?"),
        ("Network is unreachable", "no route to it: is this machine in its network?"),
    )
    said = next(
        (meaning for text, meaning in meanings if run.returncode == SSH_FAILED and text in run.stderr), None
    )
    last = next((line.strip() for line in reversed(run.stderr.splitlines()) if line.strip()), "")
    last = last or f"exit code {run.returncode}"
    if said is None and (run.returncode in (126, 127) or "No module named" in run.stderr):
        said = f"no hvd-lb there ({last}): install it where it is here, {sys.executable}"
    return said or f"it gave no answer: {last}"
