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
from hvd_lb.machine.slurm import line_of_job

# What sbatch and salloc leave in the environment for srun, and would change what is asked for here: one task per rank
# in our order, each with all cores and GPUs that the job has on its node.
_UNSET = (
    *("SLURM_HOSTFILE", "SLURM_EXACT", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_NTASKS_PER_GPU", "SLURM_NTASKS_PER_TRES"),
    *("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_SOCKET", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"),
    *("SLURM_CPUS_PER_GPU", "SLURM_MEM_PER_GPU", "SLURM_GRES", "SLURM_STEP_GRES"),
    *("SLURM_TRES_PER_TASK", "SLURM_TRES_BIND", "SLURM_EXCLUSIVE"),
    # What a user may have set for steps of his own, and would hide or change what they say.
    *("SLURM_LABELIO", "SLURM_STDOUTMODE", "SLURM_STDERRMODE", "SLURM_MULTI_PROG"),
)
# What an interpreter needs before it reads the job's file, which holds the rest; SLURM_* go along in any case.
_EXPORTED = ("HOME", "PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


# Steps of a job that are no command of srun's: the shell of `salloc` on its first node, and the batch script.
_STEPS_OF_THE_JOB = ("4294967290", "4294967291")
#: How a job asks for GPUs so that every node has as many: srun cannot start ranks in one where they differ.
MORE_GPUS = "ask Slurm for as many on every node (--nodes and --gpus-per-node of sbatch or salloc)"


@dataclass(frozen=True)
class Allocation:
    """Nodes of a job and their slots, in Slurm's order; `gpus` are those on each node, 0 where none are used."""

    nodes: list[tuple[str, int]]
    gpus: int


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
) -> Allocation | None:
    """What the job has that this process is in; None outside of one.

    A slot is a GPU, where the job has some and `device` is not cpu, else a task. Within a step of one task (`srun -N1`
    in a larger job) it is that step's node alone. Nodes that Slurm has taken out of the job are left out. UserError in
    one task of several, in a heterogeneous job, and where nodes have different numbers of GPUs.
    """
    nodes = environ.get("SLURM_JOB_NODELIST")
    if "SLURM_HET_SIZE" in environ:  # salloc gives each component a list of its own
        raise UserError(
            f"this is a heterogeneous Slurm job of {environ['SLURM_HET_SIZE']} components, and the ranks of a run are "
            f"alike: submit it as one component; {MORE_GPUS}"
        )
    if not nodes:
        return None
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        raise UserError(
            f"this is one of {tasks} tasks that srun started, expected one process that starts the others: "
            "run `hvd-lb train` in the batch script or under salloc, without srun"
        )
    step = environ.get("SLURM_STEP_ID", _STEPS_OF_THE_JOB[0]) not in _STEPS_OF_THE_JOB
    names = [environ["SLURMD_NODENAME"]] if step and "SLURMD_NODENAME" in environ else expand_nodes(nodes)
    try:
        job = environ["SLURM_JOB_ID"]
        # The controller knows which nodes the job still has, and the GPUs on each: variables tell the batch script of
        # its own node, and other processes what was asked for.
        details = line_of_job(_scontrol("show", "job", "--details", "--oneliner", job), job)
        still = re.search(r"(?<!\S)NodeList=(\S+)", details)
        there = _names(still[1]) if still else names
        left = [name for name in names if name in there]
        if not left:
            raise ValueError(f"the job has {', '.join(there)}")
        if device != "cpu" and (gpus := _gpus(left, job, details)):
            return Allocation([(name, gpus) for name in left], gpus)
        slots = dict(zip(names, tasks_per_node(environ), strict=True))
        return Allocation([(name, slots[name]) for name in left], 0)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"this looks like a Slurm job on {nodes}, but what is known of it is not whole ({error}): run hvd-lb "
            "in the job's own shell, or give --launcher local for this machine alone"
        ) from None


def tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """Tasks that the job was asked for on each of its nodes, or cores where it was not said."""
    return expand_counts(environ.get("SLURM_TASKS_PER_NODE") or environ["SLURM_JOB_CPUS_PER_NODE"])


def _gpus(names: Sequence[str], job: str, details: str) -> int:
    """GPUs of the job on each of these nodes, the same number on all of them; UserError where it is not."""
    there = gpus_of_nodes(details)
    counts = [there[name] for name in names]
    if len(set(counts)) > 1:
        each = ", ".join(f"{count} on {name}" for name, count in zip(names, counts, strict=True))
        raise UserError(
            f"Slurm job {job} has {each}: srun starts processes only with as many GPUs on each node; {MORE_GPUS}"
        )
    return counts[0]


def gpus_of_nodes(details: str) -> dict[str, int]:
    """GPUs of a job on each of its nodes, from `scontrol show job --details --oneliner`."""
    gpus: dict[str, int] = {}
    for nodes, resources in re.findall(r"(?<!\S)Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)", details):
        # gpu:2(IDX:0-1), with a type gpu:h100:2(IDX:0,3); (CNT:2) where Slurm only counts them
        counts = re.findall(r"(?:^|,)gpu(?::[^:,()]+)??(?::(\d+)\(IDX|\(CNT:(\d+))", resources)
        count = sum(int(number or counted) for number, counted in counts)
        gpus |= dict.fromkeys(_names(nodes), count)
    return gpus


def _names(nodes: str) -> list[str]:
    return expand_nodes(nodes) if "[" in nodes else nodes.split(",")


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
    return _scontrol("show", "hostnames", nodes).split()


def _scontrol(*words: str) -> str:
    try:
        found = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError(
            "this is in a Slurm job, but there is no scontrol on PATH: run hvd-lb where Slurm's commands are, not in a "
            "container, or give --launcher local"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"scontrol {' '.join(words)} failed; give --launcher local for this machine alone: {error.stderr.strip()}"
        ) from None
    return found.stdout


def srun_command(
    hosts: Sequence[tuple[str, int]],
    command: Sequence[str],
    *,
    gpus: int = 0,
    mpi: str = "none",
    container: PyxisContainer | None = None,
) -> list[str]:
    """Starts `command` once per slot: the ranks fill `hosts`, nodes of the allocation in its order, one by one.

    Each sees the `gpus` that the job has on its node. The job ends when one rank fails. `mpi` is a value of srun's
    --mpi, such as pmix.
    """
    places = [name for name, count in hosts for _ in range(count)]
    return [
        *_srun(len(places), len(hosts), gpus, mpi, container),
        *(f"--nodelist={','.join(places)}", "--kill-on-bad-exit=1", "--input=none", "--unbuffered"),
        *command,
    ]


def one_per_node(
    nodes: Sequence[str], command: Sequence[str], *, gpus: int = 0, container: PyxisContainer | None = None
) -> list[str]:
    """Starts `command` once on each node; all read what srun reads, and answer in whole lines, in any order."""
    srun = _srun(len(nodes), len(nodes), gpus, "none", container)
    return [*srun, f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=0", "--input=all", *command]


def one_somewhere(*, gpus: int = 0) -> list[str]:
    """Starts a command once, on the node that follows; after that comes the command, which reads what srun reads."""
    return [*_srun(1, 1, gpus, "none", None), "--input=all", "--nodelist"]


def on_node(node: str, command: Sequence[str]) -> list[str]:
    """Runs `command` once on a node of the allocation, which reads and writes what srun does."""
    return one_per_node([node], command)


def _srun(tasks: int, nodes: int, gpus: int, mpi: str, container: PyxisContainer | None) -> list[str]:
    """srun with so many tasks on so many nodes; a `--nodelist` of as many names as tasks says which are where."""
    return [
        "env",
        *(word for name in _UNSET for word in ("-u", name)),
        *("srun", "--distribution=arbitrary", f"--nodes={nodes}", f"--ntasks={tasks}"),
        # Beside a task that the job may have already, also with more GPUs than cores; all cores to each, whatever the
        # site binds tasks to.
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *("--overlap", "--overcommit", "--cpu-bind=none", f"--mpi={mpi}", f"--export={','.join(_EXPORTED)}"),
        *(container.options() if container else []),
    ]
