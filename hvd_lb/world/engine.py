"""Which library exchanges tensors between processes: Horovod, the default and the reference, or torch.distributed."""

from __future__ import annotations

from typing import Literal

from hvd_lb.errors import UserError
from hvd_lb.world.build import import_horovod
from hvd_lb.world.launched import Place

Engine = Literal["horovod", "torch"]
EngineName = Literal["auto", "horovod", "torch"]

# Those that tell Horovod how its processes meet.
_OF_HOROVOD = ("horovodrun", "mpirun", "srun --mpi=pmix")


def choose_engine(asked: EngineName, place: Place | None) -> tuple[Engine, str]:
    """The engine of a job, and why in a few words; `place` is None where hvd-lb starts the processes itself.

    UserError where Horovod, or its own launcher, is asked for and Horovod cannot be had.
    """
    if asked == "torch":
        return "torch", "as asked for"
    if place and not _connects(place):
        refuse_unconnected(asked, place)
        return "torch", f"started by {place.launcher}"
    try:
        import_horovod()
    except UserError as error:
        if asked == "horovod" or (place and place.launcher == "horovodrun"):
            raise
        return "torch", str(error).partition(":")[0].partition(", but several")[0]
    return "horovod", "as asked for" if asked == "horovod" else ""


def refuse_unconnected(asked: EngineName, place: Place) -> None:
    """UserError where Horovod is asked for among processes that it does not connect, whatever is installed."""
    if asked == "horovod" and not _connects(place):
        raise UserError(
            f"engine horovod, but {place.launcher} started the processes, which Horovod cannot connect: use engine "
            f"torch, or start them with horovodrun -np {place.size}"
        )


def refuse_unsummed(engine: Engine, compress: str) -> None:
    """UserError where several processes are to exchange gradients in a type that the engine does not add up."""
    if engine == "horovod" and compress == "bf16":
        raise UserError(
            "--compress bf16, but Horovod adds up no bf16: use --engine torch, or --compress fp16"
        )


def _connects(place: Place) -> bool:
    return place.launcher in _OF_HOROVOD
