"""The algorithm that adds the gradients up (paper section 4), as Horovod's variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvd_lb.errors import UserError
from hvd_lb.launch.options import SUMS_OF_ENGINE, AllreduceName
from hvd_lb.world.build import built_with, import_horovod
from hvd_lb.world.engine import Engine


@dataclass(frozen=True)
class HorovodBuild:
    """What a Horovod was built with, beside Gloo."""

    mpi: bool
    nccl: bool


def installed_build() -> HorovodBuild:
    """Of this Python's Horovod: from its record, and of a Horovod without one (not built by our script) from itself."""
    if record := built_with():
        return HorovodBuild(bool(record.get("mpi")), bool(record.get("nccl")))
    hvd = import_horovod()
    return HorovodBuild(bool(hvd.mpi_built()), bool(hvd.nccl_built()))


def allreduce_environment(
    name: AllreduceName,
    device: str,
    *,
    several_hosts: bool,
    mpirun: bool,
    build: HorovodBuild | None = None,
    engine: Engine = "horovod",
) -> dict[str, str]:
    """The variables that select an allreduce (paper section 4); UserError with the reason where it cannot be had.

    Whoever asks for an algorithm has it on one machine, too.

    `mpirun`: whether Open MPI is there to start processes with. HOROVOD_CPU_OPERATIONS is "MPI" exactly when the job
    has to be started by mpirun. `build` is the installed one if not given.
    """
    refuse = f"--allreduce {name} cannot be had here: "
    if name in ("hierarchical", "halving-doubling"):
        if engine == "torch":
            raise UserError(refuse + "torch.distributed has none: use --engine horovod, or --allreduce ring")
        build = build or installed_build()
        if name == "hierarchical" and (device != "cuda" or not build.nccl):
            raise UserError(
                refuse + "it sums inside a host with NCCL, which needs GPUs: use --allreduce ring"
            )
        if not build.mpi:
            raise UserError(
                refuse
                + "this Horovod was built without MPI (apt-get install openmpi-bin libopenmpi-dev, then "
                "build it again), or use --allreduce ring"
            )
        if not mpirun:
            raise UserError(
                refuse + "there is no mpirun: apt-get install openmpi-bin, or use --allreduce ring"
            )
    if name == "hierarchical":
        if not several_hosts:
            raise UserError(refuse + "it needs more than one host: use --allreduce ring")
        return {"HOROVOD_HIERARCHICAL_ALLREDUCE": "1", "HOROVOD_CPU_OPERATIONS": "MPI", **SUMS_OF_ENGINE}
    if name == "halving-doubling":
        if device == "cuda":
            raise UserError(
                refuse
                + "Horovod sends GPU tensors over NCCL, which has rings and trees but no halving and doubling: "
                "use --allreduce auto, ring or hierarchical"
            )
        return {
            "HOROVOD_CPU_OPERATIONS": "MPI",
            "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
            "OMPI_MCA_coll_tuned_allreduce_algorithm": "6",  # Rabenseifner: recursive halving, recursive doubling
            **SUMS_OF_ENGINE,
        }
    variables = {"HOROVOD_CPU_OPERATIONS": "GLOO"} | ({} if name == "auto" else SUMS_OF_ENGINE)
    if name == "ring" and device == "cuda":
        variables["NCCL_ALGO"] = "Ring"
    return variables


def needs_mpi(variables: Mapping[str, str]) -> bool:
    """Whether a job with these variables is one of mpirun."""
    return variables.get("HOROVOD_CPU_OPERATIONS") == "MPI"
