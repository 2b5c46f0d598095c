"""Tests of what GPUs do: the same body on the CPU, where everybody sees it pass, and on CUDA, marked gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = [
    pytest.param(torch.device("cpu"), id="cpu"),
    pytest.param(torch.device("cuda", 0), id="cuda", marks=GPU),
]


@contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """Inside, on a GPU, it is an error to make the host wait for it (as copies to the host do)."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
