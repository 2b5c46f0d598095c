"""The processes of a Horovod job: NCCL for CUDA tensors, Gloo or MPI for those on the CPU.

Horovod is imported when a `HorovodWorld` is made, not before: `simulate` works without it.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_lb.errors import ExchangeError, UserError
from hvd_lb.world.build import HOW_TO_BUILD, import_horovod
from hvd_lb.world.gather import broadcast_bytes
from hvd_lb.world.launched import launched
from hvd_lb.world.lines import Lines, Patience

# With either of these somebody wants to see how Horovod adds up.
_OF_ITS_SUMS = ("HOROVOD_TIMELINE", "HOROVOD_AUTOTUNE")


def is_to_add_up(environment: Mapping[str, str]) -> bool:
    """Whether its variables ask for something that it does in sums of its own."""
    return any(environment.get(name, "0") not in ("", "0") for name in _OF_ITS_SUMS)


class HorovodHandle:
    """A reduction under way in Horovod's background thread."""

    def __init__(
        self, hvd: Any, handle: int, tensor: Tensor, lines: Lines, patience: Patience | None
    ) -> None:
        self._hvd, self._handle, self._tensor, self._lines = hvd, handle, tensor, lines
        self._patience, self._over = patience, False

    @property
    def done(self) -> bool:
        return self._over or bool(self._hvd.poll(self._handle))

    def wait(self) -> Tensor:
        """Sleeps between looks: `hvd.synchronize` alone looks without a pause, for which it takes a whole core."""
        if not self._over:
            self._lines.wait_for(lambda: self.done, self._patience)
            self._over = True
            # It raises what went wrong, but has nothing of a handle that `abandon` has cleared meanwhile.
            if self._hvd.synchronize(self._handle) is None:
                raise ExchangeError("the connections were cut")
        return self._tensor


class HorovodWorld:
    """The job that horovodrun has started; made once per process. `HorovodInternalError` surfaces as it is.

    Which CUDA device a process uses is the caller's choice, before its first CUDA tensor:
    `torch.cuda.set_device(world.local_rank)`.
    """

    def __init__(self, *, watched: bool = False) -> None:
        self._watched = watched
        self._hvd = import_horovod()
        # Gradients come in buckets. Horovod would copy those that are ready together into one of its own, and back.
        if "HOROVOD_AUTOTUNE" not in os.environ:
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        self._lines = Lines()
        with self._lines.while_joining():
            self._hvd.init()
        self.rank: int = self._hvd.rank()
        self.size: int = self._hvd.size()
        self.local_rank: int = self._hvd.local_rank()
        self.local_size: int = self._hvd.local_size()
        if (place := launched(os.environ)) and place.size != self.size:
            raise UserError(
                f"{place.size} processes were started, and Horovod found {self.size}: it was built without MPI, so "
                f"start them with horovodrun, or {HOW_TO_BUILD} with MPI"
            )

    def room(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    def allreduce_async(self, tensor: Tensor, name: str) -> HorovodHandle:
        return self._start(tensor, name, self._hvd.Sum)

    def maximum_async(self, tensor: Tensor, name: str) -> HorovodHandle:
        return self._start(tensor, name, self._hvd.Max)

    def _start(self, tensor: Tensor, name: str, op: Any) -> HorovodHandle:
        if tensor.dtype == torch.bfloat16:
            raise UserError("Horovod adds up no bf16: use engine torch, or fp16")
        handle = self._hvd.allreduce_async_(tensor, name=name, op=op)
        return self._handle(handle, tensor, name)

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.allreduce_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        handle = self._hvd.broadcast_async_(tensor, root_rank=0, name=name)
        return self._handle(handle, tensor, name).wait()

    def _handle(self, handle: int, tensor: Tensor, name: str) -> HorovodHandle:
        return HorovodHandle(self._hvd, handle, tensor, self._lines, self._patience(name))

    def _patience(self, name: str) -> Patience | None:
        return None if self._watched else Patience(self.rank, name)

    def wait_for(self, done: Callable[[], bool], name: str) -> None:
        """Sleep until something is done that others have a part in; ExchangeError where connections are cut."""
        self._lines.wait_for(done, self._patience(name))

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        return broadcast_bytes(self, data, name)

    def barrier(self) -> None:
        self.allreduce(torch.zeros(1), "hvd_lb.barrier")

    def shutdown(self) -> None:
        self._hvd.shutdown()

    def cut(self) -> None:
        self._lines.cut()

    def abandon(self) -> None:
        self._hvd.shutdown()
        self._hvd.mpi_ops._handle_map.clear()  # what was under way when another process died holds its tensors
