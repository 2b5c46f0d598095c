"""A world of one process, without Horovod: `simulate`, and any script started by plain python."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Done:
    """A reduction over one process: finished when it starts."""

    tensor: Tensor
    done = True

    def wait(self) -> Tensor:
        return self.tensor


class Solo:
    """Rank 0 of 1: every sum and maximum is its own argument."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def room(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    def allreduce_async(self, tensor: Tensor, name: str) -> Done:
        return Done(tensor)

    def maximum_async(self, tensor: Tensor, name: str) -> Done:
        return Done(tensor)

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        return tensor

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        return data

    def barrier(self) -> None:
        return None

    def shutdown(self) -> None:
        return None

    cut = abandon = shutdown
