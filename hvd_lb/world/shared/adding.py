"""Adding tensors up on a CPU."""

import numpy as np
import torch
from torch import Tensor


def add(total: Tensor, term: Tensor) -> None:
    """In place. By NumPy where torch would multiply by 1 first, which CPUs have no fast way for in 64 bits."""
    if total.dtype is torch.int64 and not total.is_cuda:
        np.add(total.numpy(), term.numpy(), out=total.numpy())
    else:
        total.add_(term)
