"""The processes of a Horovod job: NCCL for CUDA tensors, Gloo or MPI for those on the CPU.

Horovod is imported when a `HorovodWorld` is made, not before: `simulate` works without it.
"""

import os
from typing import Any

import torch
from torch import Tensor

from hvd_lb.errors import UserError
from hvd_lb.world.build import HOW_TO_BUILD, import_horovod
from hvd_lb.world.launched import launched


class HorovodHandle:
    """A reduction under way in Horovod's background thread."""

    def __init__(self, hvd: Any, handle: int, tensor: Tensor) -> None:
        self._hvd, self._handle, self._tensor = hvd, handle, tensor

    def wait(self) -> Tensor:
        self._hvd.synchronize(self._handle)
        return self._tensor


class HorovodWorld:
    """The job that horovodrun has started; made once per process. `HorovodInternalError` surfaces as it is.

    Which CUDA device a process uses is the caller's choice, before its first CUDA tensor:
    `torch.cuda.set_device(world.local_rank)`.
    """

    def __init__(self) -> None:
        self._hvd = import_horovod()
        self._hvd.init()
        self.rank: int = self._hvd.rank()
        self.size: int = self._hvd.size()
        self.local_rank: int = self._hvd.local_rank()
        self.local_size: int = self._hvd.local_size()
        if (place := launched(os.environ)) and place[1] != self.size:
            raise UserError(
                f"{place[1]} processes were started, and Horovod found {self.size}: it was built without MPI, so start "
                f"them with horovodrun, or {HOW_TO_BUILD} with MPI"
            )

    def allreduce_async(self, tensor: Tensor, name: str) -> HorovodHandle:
        return self._start(tensor, name, self._hvd.Sum)

    def maximum_async(self, tensor: Tensor, name: str) -> HorovodHandle:
        return self._start(tensor, name, self._hvd.Max)

    def _start(self, tensor: Tensor, name: str, op: Any) -> HorovodHandle:
        return HorovodHandle(self._hvd, self._hvd.allreduce_async_(tensor, name=name, op=op), tensor)

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.allreduce_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        return self._hvd.broadcast_(tensor, root_rank=0, name=name)

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        length = int(self.broadcast(torch.tensor([len(data)]), f"{name}.length").item())
        if length == 0:
            return b""
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            buffer = torch.empty(length, dtype=torch.uint8)
        return self.broadcast(buffer, f"{name}.bytes").numpy().tobytes()

    def barrier(self) -> None:
        self._hvd.barrier()

    def shutdown(self) -> None:
        self._hvd.shutdown()
