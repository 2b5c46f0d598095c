"""What rounding depends on besides the recipe: which kernels torch may take, and a record of the rest.

The reproducible mode needs kernels that always add in the same order; otherwise the fastest are taken
(docs/exactness.md).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_lb.errors import UserError
from hvd_lb.exact.rounding import SEEN_NOWHERE_ELSE
from hvd_lb.machine.cpu import cpu_features
from hvd_lb.machine.packages import COMPUTING, version


@contextmanager
def fast_kernels(*, tf32: bool = False) -> Iterator[None]:
    """Inside, cuDNN takes the fastest convolution it finds by trying; on a CPU nothing changes.

    torch's own default for convolutions in fp32 is TF32, which keeps 11 bits of each factor: here only with `tf32`.
    """
    with _tf32(tf32):
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextmanager
def deterministic_kernels(model: str, *, tf32: bool = False) -> Iterator[None]:
    """Inside, torch uses deterministic kernels only. UserError when `model` needs one that does not exist."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill, benchmark = settings.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # costs time, and nobody reads such memory
    torch.backends.cudnn.benchmark = False
    try:
        with _tf32(tf32):
            yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"{model} uses {name.split()[-1]}, which has no deterministic kernel on this device: "
            "train it with --no-reproducible, or choose another --model or --device"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def rounding_environment(device: str) -> dict[str, Any]:
    """What the last bits of a run depend on besides its recipe, as JSON values; `device` is cpu or cuda, and here."""
    environment: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    environment |= {name: version(name) for name in COMPUTING}
    environment["torch"] = torch.__version__  # with the build it is of
    environment["cuda"] = torch.version.cuda
    environment["machine"] = platform.machine()
    environment["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    environment["cpu_features"] = cpu_features()
    environment |= {name: os.environ[name] for name in SEEN_NOWHERE_ELSE if os.environ.get(name)}
    return environment
