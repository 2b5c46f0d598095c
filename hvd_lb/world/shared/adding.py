"""Adding tensors up on a CPU."""

import numpy as np
import torch
from torch import Tensor


def add(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """The sum, in `out`. By NumPy where torch would multiply by 1 first, which CPUs have no fast way for in 64 bits."""
    if first.dtype is torch.int64 and first.device.type == "cpu":
        np.add(first.numpy(), second.numpy(), out=out.numpy())
        return out
    return torch.add(first, second, out=out)
