"""A Slurm allocation: which nodes it has, and the command lines of srun that start ranks and probes on them.

No ssh is needed between nodes. The batch script around it is written in `submit.slurm`.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hvd_lb.errors import UserError

# What sbatch and salloc leave in the environment for srun, and would change what is asked for here: one task per rank
# in our order, each with all cores and GPUs that the job has on its node.
_UNSET = (
    "SLURM_HOSTFILE",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPU_BIND",
    "SLURM_TRES_PER_TASK",
    "SLURM_TRES_BIND",
    "SLURM_CPUS_PER_TASK",
    "SRUN_CPUS_PER_TASK",
    "SLURM_EXACT",
)
# What an interpreter needs before it reads the job's file, which holds the rest; SLURM_* go along in any case.
_EXPORTED = ("HOME", "PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


@dataclass(frozen=True)
class PyxisContainer:
    """An image that Pyxis (the `--container-*` options of srun) runs tasks in; `mounts` are the same paths inside."""

    image: str
    mounts: tuple[str, ...] = ()

    def options(self) -> list[str]:
        if bad := [mount for mount in self.mounts if set(mount) & set(":,")]:
            raise UserError(f"{bad[0]!r} cannot be mounted by Pyxis: expected a path without : and , in it")
        mounts = ",".join(f"{mount}:{mount}" for mount in self.mounts)
        return [f"--container-image={self.image}", *([f"--container-mounts={mounts}"] if mounts else [])]


def allocation(
    device: Literal["auto", "cpu", "cuda"], environ: Mapping[str, str] = os.environ
) -> list[tuple[str, int]] | None:
    """Nodes and slots of the job that this process is in, in Slurm's order; None outside of one.

    A slot is a GPU, where the job has some and `device` is not cpu, else a task. UserError in one task of several.
    """
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        raise UserError(
            f"this is one of {tasks} tasks that srun started, expected one process that starts the others: "
            "run `hvd-lb train` in the batch script or under salloc, without srun"
        )
    names = expand_nodes(nodes)
    try:
        return list(zip(names, slots(device, environ), strict=True))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"this looks like a Slurm job on {nodes}, but its variables are not whole ({error}): run hvd-lb in the "
            "job's own shell, or give --launcher local for this machine alone"
        ) from None


def slots(device: Literal["auto", "cpu", "cuda"], environ: Mapping[str, str]) -> list[int]:
    """Slots of each node of a job, from the environment of its batch script."""
    nodes = int(environ["SLURM_JOB_NUM_NODES"])
    if device != "cpu" and (gpus := int(environ.get("SLURM_GPUS_ON_NODE", "0"))):
        return [gpus] * nodes
    return expand_counts(environ.get("SLURM_TASKS_PER_NODE") or environ["SLURM_JOB_CPUS_PER_NODE"])


def expand_counts(text: str) -> list[int]:
    """One number per node, from Slurm's "2(x3),1"."""
    counts = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise ValueError(f"{text!r} is not a count per node as Slurm gives it, such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_nodes(nodes: str) -> list[str]:
    """The names in Slurm's "h[1-3]", by `scontrol`."""
    try:
        found = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise UserError(
            f"this is in a Slurm job on {nodes}, but there is no scontrol on PATH: "
            "run hvd-lb where Slurm's commands are, not in a container, or give --launcher local"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"scontrol does not expand {nodes!r}; give --launcher local for this machine alone: {error.stderr.strip()}"
        ) from None
    return found.stdout.split()


def srun_command(
    hosts: Sequence[tuple[str, int]],
    command: Sequence[str],
    *,
    mpi: str = "none",
    container: PyxisContainer | None = None,
) -> list[str]:
    """Starts `command` once per slot: the ranks fill `hosts`, nodes of the allocation in its order, one by one.

    The job ends when one rank fails. `mpi` is a value of srun's --mpi, such as pmix.
    """
    return [
        *_srun([name for name, count in hosts for _ in range(count)], mpi, container),
        *("--kill-on-bad-exit=1", "--input=none", "--unbuffered"),
        *command,
    ]


def one_per_node(
    nodes: Sequence[str], command: Sequence[str], *, container: PyxisContainer | None = None
) -> list[str]:
    """Starts `command` once on each node; all read what srun reads, and answer in whole lines, in any order."""
    return [*_srun(nodes, "none", container), "--kill-on-bad-exit=0", "--input=all", *command]


def on_node(node: str, command: Sequence[str]) -> list[str]:
    """Runs `command` once on a node of the allocation, which reads and writes what srun does."""
    return one_per_node([node], command)


def _srun(places: Sequence[str], mpi: str, container: PyxisContainer | None) -> list[str]:
    """srun with one task for each place, a node's name, in this order."""
    return [
        "env",
        *(word for name in _UNSET for word in ("-u", name)),
        *("srun", "--distribution=arbitrary", f"--nodelist={','.join(places)}"),
        *(f"--nodes={len(set(places))}", f"--ntasks={len(places)}"),
        # Beside a task that the job may have already, also with more GPUs than cores; all cores to each, whatever the
        # site binds tasks to.
        *("--overlap", "--overcommit", "--cpu-bind=none", f"--mpi={mpi}", f"--export={','.join(_EXPORTED)}"),
        *(container.options() if container else []),
    ]
