"""How the processes of a job are started: what each launcher gives, as pure data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvd_lb.launch.hosts import Host

# Long enough for the slowest step, short enough that a hang does not last the night (off by default in Horovod).
_STALL_SECONDS = 1800


@dataclass(frozen=True)
class LaunchPlan:
    """`command(JOB.json)` starts all processes of a job, `environment` is set in each of them before anything else.

    `during` is entered while they run, if there is one; what it gives is added to their environment.
    """

    starter: Literal["local", "ssh", "slurm"]
    hosts: list[Host]
    command: Callable[[Path], list[str]]
    interfaces: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    during: Callable[[], AbstractContextManager[Mapping[str, str]]] | None = None


def rank_command(job_file: Path, python: str = sys.executable) -> list[str]:
    """The command line of one process of a job. -P: `-m` would look into the working directory first."""
    return [python, "-P", "-m", "hvd_lb.launch.rank.entry", os.fspath(job_file)]


def horovodrun_command(
    hosts: Sequence[Host],
    job_file: Path,
    *,
    address: str,
    interfaces: Sequence[str],
    ssh: Sequence[str] = ("ssh",),
    mpi_arguments: str | None = None,
) -> list[str]:
    """horovodrun (see `starters.horovodrun`) on `hosts`; with Open MPI when `mpi_arguments` are given, else Gloo."""
    how = ["--gloo"] if mpi_arguments is None else ["--mpi", f"--mpi-args={mpi_arguments}"]
    return [
        *(sys.executable, "-P", "-m", "hvd_lb.launch.starters.horovodrun", address, *ssh, "--"),
        *(*how, "-np", str(sum(host.slots or 0 for host in hosts))),
        *("-H", ",".join(map(str, hosts)), "--network-interface", ",".join(interfaces), "--disable-cache"),
        *rank_command(job_file),
    ]


def process_environment(threads: int) -> dict[str, str]:
    """What every process needs, however it is started."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONUNBUFFERED": "1",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(_STALL_SECONDS),
    }
