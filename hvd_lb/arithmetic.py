"""In which arithmetic a recipe has a network computed, by training and by what comes after it alike."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from hvd_lb.exact.reproducible import deterministic_kernels, fast_kernels
from hvd_lb.recipe import Recipe

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def dtype(recipe: Recipe) -> torch.dtype:
    """Of weights and images."""
    return torch.float64 if recipe.precision == "fp64" else torch.float32


def memory_format(recipe: Recipe) -> torch.memory_format:
    """Of weights and images."""
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def kernels(recipe: Recipe) -> AbstractContextManager[None]:
    """What steps run in: only deterministic kernels in the reproducible mode, else the fastest."""
    tf32 = recipe.precision == "tf32"
    return deterministic_kernels(recipe.model, tf32=tf32) if recipe.reproducible else fast_kernels(tf32=tf32)


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[None]:
    """What forward passes run in."""
    if recipe.precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[recipe.precision])
