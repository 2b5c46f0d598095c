"""CUDA kernels of our own, compiled when they are needed.

NVRTC, and bindings to it and to the driver, come with torch: a machine needs neither a compiler nor a toolkit (hvd-lb's
image has none).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def why_not() -> str:
    """Why kernels cannot be compiled here; empty where they can."""
    try:
        from cuda.bindings import nvrtc

        found, *version = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:  # the bindings, or the library that they look for
        return " ".join(f"NVIDIA's cuda-bindings, and NVRTC of the same CUDA, are needed ({error})".split())
    return "" if not found.value else f"NVRTC {version} fails: {found.name}"


def compile_cuda(source: str, constants: Mapping[str, int], architecture: str) -> bytes:
    """The binary of some CUDA C++ for a GPU of such an architecture (as "90"), with these as macros.

    `RuntimeError` says what the compiler says.
    """
    from cuda.bindings import nvrtc

    defined = [f"-D{name}={value}" for name, value in constants.items()]
    options = [option.encode() for option in (f"-arch=sm_{architecture}", "-std=c++17", *defined)]
    program = _done(nvrtc.nvrtcCreateProgram(source.encode(), b"hvd_lb.cu", 0, [], []))
    try:
        failed, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if failed.value:
            log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
            _done(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"a kernel does not compile for sm_{architecture}: {log.decode().strip()}")
        binary = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
        _done(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Program:
    """The kernels of a source, compiled for a GPU, on which tensors have been made."""

    def __init__(self, source: str, constants: Mapping[str, int], device: torch.device):
        from cuda.bindings import driver

        architecture = "".join(map(str, torch.cuda.get_device_capability(device)))
        with torch.cuda.device(device):
            torch.empty(1, device=device)
            self._context = _done(driver.cuCtxGetCurrent())
            self._binary = compile_cuda(source, constants, architecture)
            self._module = _done(driver.cuModuleLoadData(self._binary))
        self._device = device
        self._functions: dict[str, Any] = {}

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], *arguments: Tensor | int | float
    ) -> None:
        """On the current stream: tensors as pointers, whole numbers as int, others as double."""
        from cuda.bindings import driver

        _done(driver.cuCtxSetCurrent(self._context))  # a thread of autograd may have none yet
        if name not in self._functions:
            self._functions[name] = _done(driver.cuModuleGetFunction(self._module, name.encode()))
        values = tuple(of.data_ptr() if isinstance(of, Tensor) else of for of in arguments)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        passed = (values, tuple(map(_type, arguments)))
        _done(driver.cuLaunchKernel(self._functions[name], *grid, *block, 0, stream, passed, 0))


def _type(argument: Tensor | int | float) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_int if isinstance(argument, int) else ctypes.c_double


def _done(returned: tuple[Any, ...]) -> Any:
    """What a call of CUDA returned besides its error, of which there is none."""
    error, *values = returned
    if error.value:
        raise RuntimeError(f"CUDA says {error.name}")
    return values[0] if values else None
