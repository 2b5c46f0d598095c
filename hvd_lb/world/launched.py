"""Is this process one of several of a job: what launchers tell their processes, in environment variables.

Variables stay behind in shells and batch jobs, so a rank alone says nothing: of a job there are several processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hvd_lb.errors import UserError

# Rank and number of processes: horovodrun (Gloo), Open MPI's mpirun, the PMI launchers of MPICH, Intel and Cray MPI,
# and srun --mpi=pmix.
_LAUNCHERS = (
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
)
# Those that start processes which Horovod cannot connect.
_OTHERS = {"torchrun": ("RANK", "WORLD_SIZE"), "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")}

_OF_A_JOB = re.compile(
    r"HOROVOD_((LOCAL_|CROSS_)?(RANK|SIZE)|HOSTNAME|CONTROLLER|CPU_OPERATIONS|GLOO_(RENDEZVOUS_.*|IFACE))"
    r"|OMPI_(?!MCA_).*|OMPI_MCA_(ess|orte|pmix|initial_wdir).*|PMI2?_.*|PMIX_(?!MCA_).*"
)


def launched(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and number of processes of the job that a launcher known to Horovod has made; None for one process."""
    return next(filter(None, (_several(environment, *names) for names in _LAUNCHERS)), None)


def refuse_worlds_of_one(environment: Mapping[str, str]) -> None:
    """UserError where several processes were started that would each train for itself."""
    for launcher, (rank, size) in _OTHERS.items():
        if not launched(environment) and (place := _several(environment, rank, size)):
            raise UserError(
                f"{launcher} started this as one of {place[1]} processes ({size}={place[1]}), and each would train for "
                f"itself: start them with horovodrun -np {place[1]}, or unset {size} for one process alone"
            )


def refuse_torchrun(environment: Mapping[str, str]) -> None:
    """UserError where torchrun has started `hvd-lb` itself, which starts the processes of a run."""
    if place := _several(environment, *_OTHERS["torchrun"]):
        raise UserError(
            f"torchrun started this as one of {place[1]} processes (WORLD_SIZE={place[1]}), and hvd-lb starts its own: "
            "call it without torchrun, or unset WORLD_SIZE where that is left from another job"
        )


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """For processes of another job: without what tells who this one is."""
    return {name: value for name, value in environment.items() if not _OF_A_JOB.fullmatch(name)}


def _several(environment: Mapping[str, str], rank: str, size: str) -> tuple[int, int] | None:
    try:
        place = int(environment[rank]), int(environment[size])
    except (KeyError, ValueError):  # left over, or made by hand
        return None
    return place if place[1] > 1 else None
