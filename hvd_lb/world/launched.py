"""Is this process one of several of a job: what launchers tell their processes, in environment variables.

Variables stay behind in shells and batch jobs, so a rank alone says nothing: of a job there are several processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hvd_lb.errors import UserError


@dataclass(frozen=True)
class Place:
    """One of `size` processes that `launcher` has started; `local_rank` counts those of a host, None: not told."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None = None


@dataclass(frozen=True)
class _Variables:
    """The variables of a launcher; all of `also` are set as well where it is this one."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    also: tuple[str, ...] = ()


# The innermost first: srun and mpirun may start one torchrun a host, and a batch job any of them.
_LAUNCHERS = (
    _Variables("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK"),
    _Variables("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("TORCHELASTIC_RUN_ID",)),
    _Variables(
        "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
    ),  # Open MPI
    _Variables("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel and Cray MPI; Flux
    _Variables(  # MVAPICH2's mpirun_rsh
        "mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"
    ),
    _Variables("srun --mpi=pmix", "PMIX_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    # What torch itself reads, set by hand, or by an operator of Kubernetes.
    _Variables("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("MASTER_ADDR", "MASTER_PORT")),
    _Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    _Variables("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
)

_OF_A_JOB = re.compile(
    r"HOROVOD_((LOCAL_|CROSS_)?(RANK|SIZE)|HOSTNAME|CONTROLLER|CPU_OPERATIONS|GLOO_(RENDEZVOUS_.*|IFACE))"
    r"|OMPI_(?!MCA_).*|OMPI_MCA_(ess|orte|pmix|initial_wdir).*|PMI2?_.*|MV2_COMM_WORLD_.*|PMIX_(?!MCA_).*"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


def launched(environment: Mapping[str, str]) -> Place | None:
    """The place of this process in the job that a launcher has made of several; None for one process."""
    return next((place for place in _places(environment) if place.size > 1), None)


def launched_alone(environment: Mapping[str, str]) -> str | None:
    """The variables, as NAME=VALUE, that tell of a job of one process, where none tell of several."""
    if launched(environment):
        return None
    for known in _LAUNCHERS:
        if environment.get(known.size) == "1" and known.rank in environment:
            return f"{known.rank}={environment[known.rank]} and {known.size}=1"
    return None


def refuse_unclear(environment: Mapping[str, str]) -> None:
    """UserError where of a rank and a number of processes, both set, only one is a number, as in `RANK= WORLD_SIZE=2`,
    or the rank is none of so many, as in `RANK=5 WORLD_SIZE=2`.

    For processes that none of the variables make one of several: each would be one alone.
    """
    for known in _LAUNCHERS:
        rank, size = _number(environment, known.rank), _number(environment, known.size)
        both = known.rank in environment and known.size in environment
        if both and (rank is None) != (size is None) and size != 1:
            raise UserError(
                f"{known.rank}={environment[known.rank]!r} and {known.size}={environment[known.size]!r}: expected two "
                "numbers, which of how many processes this is: set both, or unset them where another job has left them"
            )
        if rank is not None and size is not None and rank >= size > 1:
            raise UserError(
                f"{known.rank}={rank} and {known.size}={size}: ranks of {size} processes are 0 to {size - 1}; set both "
                "right, or unset them where another job has left them"
            )


def refuse_several(environment: Mapping[str, str], command: str) -> None:
    """UserError where a launcher has started several of a command that is one process."""
    if place := launched(environment):
        raise UserError(
            f"{place.launcher} started this as one of {place.size} processes, and `{command}` is one: call it without, "
            "or unset those variables where they are left from another job"
        )


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """For processes of another job: without what tells who this one is."""
    return {name: value for name, value in environment.items() if not _OF_A_JOB.fullmatch(name)}


def _places(environment: Mapping[str, str]) -> list[Place]:
    places = []
    for known in _LAUNCHERS:
        rank, size = _number(environment, known.rank), _number(environment, known.size)
        if rank is None or size is None or rank >= size > 1:
            continue
        if all(name in environment for name in known.also):
            places.append(Place(known.launcher, rank, size, _number(environment, known.local_rank)))
    return places


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """None for what is not set, or left over and not whole, or made by hand."""
    value = environment.get(name, "")
    return int(value) if re.fullmatch("[0-9]{1,9}", value, re.ASCII) else None
