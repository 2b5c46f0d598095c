"""How the processes of a job are started: what each launcher gives, as pure data."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.options import CYCLE_TIME, START_TIMEOUT
from hvd_lb.machine.cpu import kernel_variables
from hvd_lb.machine.process import memory_variables
from hvd_lb.world.build import joins_again
from hvd_lb.world.engine import Engine

# For Python to start from a cold network file system, on the last host; Gloo alone gives up after 30.
START_SECONDS = 600
#: What an interpreter reads before it runs anything: the rest is in the job's file.
ON_COMMAND_LINES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
_MANY_HOSTS = (
    64  # from here on Open MPI does not start daemons by daemons, which would need keys between hosts
)


class Running(Protocol):
    """The process whose life is the job's; statuses are those of `subprocess.Popen`, or UNTOLD."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        ...

    def end(self, sign: signal.Signals) -> None:
        """Sends it a signal that ends the job."""
        ...


class Started(Protocol):
    """Ranks that were started by somebody else, and wait."""

    def begin(self, job: str) -> Running:
        """Have all of them begin; `job` is a `launch.job.Job` in JSON. What is given is rank 0."""
        ...


#: The status of a process of which is only known that it has ended.
UNTOLD = 256


@dataclass(frozen=True)
class LaunchPlan:
    """`command(JOB.json)` starts all processes of a job, `environment` is set in each of them before anything else.

    With `agents` it is a head, which heeds its launching process (`agent.head`). Where they are `started` already, no
    command is run.
    """

    starter: Literal["local", "ssh", "slurm", "launched"]
    hosts: list[Host]
    command: Callable[[Path], list[str]]
    interfaces: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    agents: bool = False
    engine: Engine = "horovod"
    why_engine: str = ""  #: in a few words, where it is not what one would expect
    started: Started | None = None


def rank_command(job_file: Path, python: str = sys.executable) -> list[str]:
    """The command line of one process of a job. -P: `-m` would look into the working directory first."""
    return [python, "-P", "-m", "hvd_lb.launch.rank.entry", os.fspath(job_file)]


def head_command(
    job_file: Path, address: str, how: Literal["each", "nodes", "all"], command: Sequence[str] = ()
) -> list[str]:
    """The head of a job (`agent.head`): it listens on `address` and has an agent started on each host by `command`."""
    head = [sys.executable, "-P", "-m", "hvd_lb.launch.agent.head", os.fspath(job_file), address]
    return [*head, how, *command]


def agent_command(job_file: Path, python: str = sys.executable) -> list[str]:
    """The agent of a host, which is told the rest on stdin; its host's name follows, but in a task of Slurm."""
    return [python, "-P", "-m", "hvd_lb.launch.agent.host", os.fspath(job_file)]


def mpirun_command(
    hosts: Sequence[Host], job_file: Path, interfaces: Sequence[str], ssh: Sequence[str] = ()
) -> list[str]:
    """Open MPI on `hosts`, over interfaces of which each host may have any; UserError for what it cannot be given."""
    if any(len(word.split()) != 1 for word in ssh):
        raise UserError(
            f"mpirun cannot be given {shlex.join(ssh)}: name an --ssh-key without spaces in its path"
        )
    login = ["--mca", "plm_rsh_agent", "ssh", "--mca", "plm_rsh_args", " ".join(ssh[1:])] if ssh else []
    if len(hosts) >= _MANY_HOSTS:
        login += (
            "--mca",
            "plm_rsh_no_tree_spawn",
            "true",
            "--mca",
            "plm_rsh_num_concurrent",
            str(len(hosts)),
        )
    networks = ",".join(interfaces)
    exported = [word for name in ON_COMMAND_LINES if name in os.environ for word in ("-x", name)]
    return [
        # Where it sees an LSF job, it looks for hosts on its own, and does not find any.
        *("env", "-u", "LSB_JOBID", "mpirun", "--allow-run-as-root", "--tag-output", "-wdir", "/"),
        *("-np", str(sum(host.slots or 0 for host in hosts)), "-H", ",".join(map(str, hosts))),
        *("-bind-to", "none", "-map-by", "slot", "--mca", "pml", "ob1", "--mca", "btl", "^openib"),
        *("--mca", "btl_tcp_if_include", networks, "--mca", "oob_tcp_if_include", networks, *login),
        *("--mca", "mpi_yield_when_idle", "1"),  # more processes than cores are common on the CPU
        *exported,
        *rank_command(job_file),
    ]


def cycles(launch: LaunchPlan, device: str, elastic: bool = False) -> dict[str, str]:
    """How often Horovod's thread looks for what is ready, where that is not as often as it does by itself, each ms.

    In each cycle the processes tell each other what is ready, also when nothing is, which takes CPU from the network's
    own work (docs/performance.md). Beside GPUs cores are free, and a sum had better not wait.
    """
    if launch.engine != "horovod" or device != "cpu" or "HOROVOD_AUTOTUNE" in launch.environment:
        return {}
    if elastic and not joins_again():
        return {}
    return {CYCLE_TIME: "10"}


def process_environment(threads: int, device: str) -> dict[str, str]:
    """What every process needs, however it is started."""
    return {
        **kernel_variables(),
        **(memory_variables() if device == "cpu" else {}),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONUNBUFFERED": "1",
        START_TIMEOUT: str(START_SECONDS),
    }
