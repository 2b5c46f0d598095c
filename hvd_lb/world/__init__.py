"""The processes of a run behind one small protocol: who am I, sum this, take that from rank 0.

Sums and maxima, never means: the normaliser of a gradient is the global minibatch and is applied once, by the optimizer
(paper remark 3). Every method except the ranks is collective: all processes call it with the same name,
shapes and dtypes. What is asynchronous they may start in any order: names tell what belongs together. Reductions are of
int32, int64, fp16, fp32 and fp64, and of bf16 where the engine is torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, get_args

from hvd_lb.errors import one_of
from hvd_lb.world.engine import EngineName, choose_engine
from hvd_lb.world.launched import launched, refuse_unclear

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Handle(Protocol):
    """A reduction under way. It keeps its tensor alive; the tensor is undefined until `wait` returns."""

    def wait(self) -> Tensor:
        """Blocks until the result is in the tensor and returns it; later calls return at once."""
        ...

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise an error, at once."""
        ...


class World(Protocol):
    """`size` processes with ranks 0 … size − 1; `local_rank` of `local_size` counts those of one host."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_size(self) -> int: ...

    def room(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """So many zeros, where this world adds up fastest: all processes make it, by the same name, for one sum."""
        ...

    def allreduce_async(self, tensor: Tensor, name: str) -> Handle:
        """Starts summing a contiguous tensor, in place; `name` is unique among what is under way."""
        ...

    def maximum_async(self, tensor: Tensor, name: str) -> Handle:
        """Starts taking the largest of each element of a contiguous tensor without NaN, in place; as above."""
        ...

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        """Sums a contiguous tensor over all processes, in place, and returns it."""
        ...

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        """Overwrites a contiguous tensor, in place, with that of rank 0 and returns it."""
        ...

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        """Returns rank 0's `data` on every process; what the others pass is ignored."""
        ...

    def barrier(self) -> None:
        """Returns when every process has called it."""
        ...

    def shutdown(self) -> None:
        """Leaves the job; no other method may be called afterwards."""
        ...


class Joined(World, Protocol):
    """A world that can be left without the others."""

    def cut(self) -> None:
        """Ends its connections, from any thread: whoever waits in it has an error."""
        ...

    def abandon(self) -> None:
        """After `cut`, as `shutdown` where not all call that."""
        ...


class ByEngine(Joined, Protocol):
    """A world of a library that exchanges tensors."""

    def wait_for(self, done: Callable[[], bool], name: str) -> None:
        """Sleep until something is done that others have a part in; ExchangeError where connections are cut."""
        ...


_current: Joined | None = None


def init(
    engine: EngineName = "auto",
    *,
    may_be_cut: bool = False,
    device: torch.device | None = None,
    watched: bool = False,
) -> World:
    """Joins the job this process was launched into, or makes a world of one; later calls return the same.

    A job is what horovodrun, mpirun, torchrun or srun has made of several processes, or RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT tell of. `engine` is what exchanges tensors: Horovod, or torch.distributed; auto takes Horovod where
    it is installed and the launcher tells it how processes meet (horovodrun, mpirun), else torch. Raises `UserError`
    for another engine, where Horovod is asked for and cannot be had, where variables tell of several processes but not
    which this one is, and where the other processes do not come; `ExchangeError` where the
    rendezvous says that they will not. Its connections `may_be_cut`: somebody may call `cut`. Processes that exchange
    tensors of a `device` are connected for that when this returns, as far as the engine can. A process that waits for
    others for long says so on stderr, once per wait; not where somebody has it `watched`.

    Where all processes are on one machine, what lies in `World.room` on the CPU is added up in memory that all of them
    see, without the engine; not with HVD_LB_SHARED_MEMORY=0, or variables of Horovod that are about its own sums.
    """
    global _current
    one_of("engine", engine, get_args(EngineName))
    if _current is None:
        place = launched(os.environ)
        if place is None:
            refuse_unclear(os.environ)
            from hvd_lb.world.solo import Solo

            _current = Solo()
        elif choose_engine(engine, place)[0] == "horovod":
            from hvd_lb.world.horovod import HorovodWorld, is_to_add_up

            _add_up_in_memory(HorovodWorld(watched=watched), wanted=not is_to_add_up(os.environ))
        else:
            from hvd_lb.world.torch_distributed import TorchWorld

            _add_up_in_memory(TorchWorld(place, may_be_cut=may_be_cut, device=device, watched=watched))
    return current()


def _add_up_in_memory(engine: ByEngine, *, wanted: bool = True) -> None:
    """The current world is the engine's, or one around it; while that is found out it may be cut."""
    global _current
    from hvd_lb.world.shared.world import through_memory

    _current = engine
    try:
        _current = through_memory(engine, wanted=wanted)
    except BaseException:
        abandon()
        raise


def current() -> World:
    """The world `init` has made; `RuntimeError` before that."""
    if _current is None:
        raise RuntimeError("no world yet: call hvd_lb.init() first")
    return _current


def cut() -> None:
    """Ends the connections of the world that there is, from any thread: whoever waits in it has an error."""
    if _current is not None:
        _current.cut()


def abandon() -> None:
    """Leaves the world `init` has made, if any, whatever the others do; `init` may be called again."""
    global _current
    if _current is not None:
        _current.cut()
        _current.abandon()
        _current = None


def shutdown() -> None:
    """Leaves the world `init` has made, if any; `init` may be called again."""
    global _current
    if _current is not None:
        _current.shutdown()
        _current = None
