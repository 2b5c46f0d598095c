"""Kernels from their source to the driver: compiled by the real NVRTC, launched by the real bindings.

The driver stands for one: it writes down what it is asked to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import GPU

from hvd_lb.kernels.program import Program, compile_cuda, why_not

NVRTC = pytest.mark.skipif(bool(why_not()), reason="needs NVRTC")
SOURCE = """
extern "C" __global__ void fill(double *out, int count, double value)
{
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        out[i] = value * FACTOR;
}
"""
DRIVER = r"""
#include <stdio.h>
#include <string.h>
typedef void *P;
static int init(unsigned flags) { return 0; }
static int version(int *found) { return *found = 13000, 0; }
static int current(P *context) { return *context = (P)0xc0, 0; }
static int set_current(P context) { return printf("context %p\n", context), 0; }
static int load(P *module, const char *binary) { return printf("load %.3s\n", binary + 1), *module = (P)0xd0, 0; }
static int find(P *function, P module, const char *name)
{
    printf("function %s of %p\n", name, module);
    return *function = (P)0xf0, strcmp(name, "fill") ? 500 : 0;
}
static int launch(P function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, P stream, P *arguments, P *extra)
{
    printf("launch %p (%u, %u, %u) (%u, %u, %u) %u on %p: %p %d %g\n", function, x, y, z, bx, by, bz, shared, stream,
           *(P *)arguments[0], *(int *)arguments[1], *(double *)arguments[2]);
    return 0;
}
int cuGetProcAddress_v2(const char *name, P *found, int version_, unsigned long long flags, int *status)
{
    struct { const char *name; P function; } known[] = {
        {"cuInit", init}, {"cuDriverGetVersion", version}, {"cuCtxGetCurrent", current},
        {"cuCtxSetCurrent", set_current}, {"cuModuleLoadData", load}, {"cuModuleGetFunction", find},
        {"cuLaunchKernel", launch}, {"cuGetProcAddress", cuGetProcAddress_v2},
    };
    *found = 0;
    for (unsigned i = 0; i < sizeof known / sizeof *known; ++i)
        if (!strcmp(name, known[i].name))
            *found = known[i].function;
    if (status)
        *status = !*found;
    return *found ? 0 : 500;
}
int cuGetProcAddress(const char *name, P *found, int version_, unsigned long long flags)
{
    return cuGetProcAddress_v2(name, found, version_, flags, 0);
}
"""
SCRIPT = """
import sys
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from hvd_lb.kernels.program import Program

empty, device = torch.empty, torch.device("cuda", 0)
torch.empty = lambda *sizes, device: empty(*sizes)
torch.cuda.device = lambda device: nullcontext()
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0x51)
program, out = Program(sys.stdin.read(), {"FACTOR": 2}, device), torch.zeros(3)
program.launch("fill", (1, 2, 3), (4, 5, 6), out, 7, 0.25)
program.launch("fill", (1, 1, 1), (1, 1, 1), out, -1, 1e-5)
print(hex(out.data_ptr()))
try:
    program.launch("empty", (1, 1, 1), (1, 1, 1), out)
except RuntimeError as error:
    print(error)
"""


@NVRTC
def test_the_driver_gets_what_is_launched(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    build = [
        "gcc",
        "-w",
        "-shared",
        "-fPIC",
        "-o",
        str(tmp_path / "libcuda.so.1"),
        str(tmp_path / "driver.c"),
    ]
    subprocess.run(build, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=SOURCE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded, context, function, first, again, second, where, *rest = done.stdout.splitlines()
    assert loaded == "load ELF"
    assert {context, again} == {"context 0xc0"}
    assert function == "function fill of 0xd0"
    assert first == f"launch 0xf0 (1, 2, 3) (4, 5, 6) 0 on 0x51: {where} 7 0.25"
    assert second == f"launch 0xf0 (1, 1, 1) (1, 1, 1) 0 on 0x51: {where} -1 1e-05"
    assert rest[-1] == "CUDA says CUDA_ERROR_NOT_FOUND"


@NVRTC
def test_what_does_not_compile_says_where() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_80: .*\"FACTOR\" is undefined"):
        compile_cuda(SOURCE, {}, "80")
    with pytest.raises(RuntimeError, match="sm_7: .*invalid value for --gpu-architecture"):
        compile_cuda(SOURCE, {"FACTOR": 2}, "7")


@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda", 0), id="cuda", marks=GPU)])
def test_on_a_gpu(device: torch.device) -> None:
    out = torch.zeros(5, dtype=torch.float64, device=device)
    Program(SOURCE, {"FACTOR": 2}, device).launch("fill", (1, 1, 1), (32, 1, 1), out, 4, 0.25)
    assert out.tolist() == [0.5, 0.5, 0.5, 0.5, 0]
