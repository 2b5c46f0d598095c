"""CUDA kernels on a CPU: the same source, compiled by g++, a thread for each thread of a block, block after block."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BEFORE = """
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>
using std::sqrt;
struct Triple { unsigned x, y, z; };
thread_local Triple threadIdx, blockIdx;
Triple blockDim, gridDim;
std::barrier<> *all_threads;
#define __global__
#define __device__
#define __shared__ static
#define __syncthreads() all_threads->arrive_and_wait()
static float __uint_as_float(unsigned bits) { float f; memcpy(&f, &bits, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned bits; memcpy(&bits, &f, 4); return bits; }
"""
_AFTER = """
template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) { kernel(*(A *)arguments[I]...); }
template <class... A> void run(void (*kernel)(A...), const unsigned *grid, const unsigned *block, void **arguments)
{
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
    std::barrier<> barrier(block[0] * block[1]);
    all_threads = &barrier;
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < block[0] * block[1]; ++i)
        threads.emplace_back([=] {
            threadIdx = {i % blockDim.x, i / blockDim.x, 0};
            for (unsigned b = 0; b < gridDim.x * gridDim.y * gridDim.z; ++b) {
                blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
                call(kernel, arguments, std::index_sequence_for<A...>());
                __syncthreads(); // what they share is the next block's
            }
        });
    for (auto &thread : threads)
        thread.join();
}
extern "C" void launch(const char *name, const unsigned *grid, const unsigned *block, void **arguments)
{
"""


class EmulatedProgram:
    """As `hvd_lb.kernels.program.Program`, for tensors on a CPU; no float16, whose conversions are of a GPU's own."""

    folder = tempfile.TemporaryDirectory(prefix="cuda-on-cpu-")  # of compiled libraries
    _one_at_a_time = threading.Lock()  # what a library's threads share is for one launch

    def __init__(self, source: str, constants: dict[str, int], device: torch.device):
        names = re.findall(r"__global__ void (\w+)", source)
        calls = "".join(
            f'    if (!strcmp(name, "{name}")) run({name}, grid, block, arguments);\n' for name in names
        )
        whole = _BEFORE + source + _AFTER + calls + "}\n"
        defined = [f"-D{name}={value}" for name, value in constants.items()]
        key = hashlib.sha256(repr((whole, defined)).encode()).hexdigest()[:16]
        library = Path(self.folder.name) / f"{key}.so"
        with self._one_at_a_time:
            if not library.exists():
                options = "-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"
                command = ["g++", "-x", "c++", *options, *defined, "-o", str(library), "-"]
                subprocess.run(command, input=whole, text=True, check=True)
        self._launch = ctypes.CDLL(str(library)).launch

    def launch(self, name: str, grid: Any, block: Any, *arguments: Tensor | float) -> None:
        values = [_value(of) for of in arguments]
        pointers = [ctypes.cast(ctypes.pointer(of), ctypes.c_void_p) for of in values]
        three = ctypes.c_uint * 3
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        with self._one_at_a_time:
            self._launch(name.encode(), three(*grid), three(*block), array)


def _value(argument: Tensor | float) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_double(argument)
