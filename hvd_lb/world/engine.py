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
    connected = place is None or place.launcher in _OF_HOROVOD
    if asked == "torch":
        return "torch", "as asked for"
    if asked == "horovod" and place and not connected:
        raise UserError(
            f"--engine horovod, but {place.launcher} started the processes, which Horovod cannot connect: use --engine "
            f"torch, or start them with horovodrun -np {place.size}"
        )
    if not connected:
        return "torch", f"started by {place.launcher}" if place else ""
    try:
        import_horovod()
    except UserError as error:
        if asked == "horovod" or (place and place.launcher == "horovodrun"):
            raise
        return "torch", str(error).partition(":")[0].partition(", but several")[0]
    return "horovod", "as asked for" if asked == "horovod" else ""
