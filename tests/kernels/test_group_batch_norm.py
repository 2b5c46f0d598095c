"""Kernels for the batch norm of several virtual workers: their own source on a CPU, thread by thread, and on GPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_on_cpu import EmulatedProgram
from devices import DEVICES, GPU, without_waiting
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hvd_lb.errors import UserError
from hvd_lb.kernels import batch_norm
from hvd_lb.kernels.batch_norm import GroupBatchNorm, proved_batch_norm
from hvd_lb.kernels.program import compile_cuda, why_not
from hvd_lb.training.batchnorm import running_statistics
from hvd_lb.training.forward import Forward
from hvd_lb.training.together.group import Group
from hvd_lb.world.solo import Solo

CPU = torch.device("cpu")
WORKERS = 3
# Channels last or not; odd sizes, for which threads take single values; planes of one value, and none.
SHAPES: list[tuple[tuple[int, ...], torch.memory_format]] = [
    ((6, 8, 4, 4), torch.channels_last),
    ((9, 70, 3, 5), torch.channels_last),
    ((6, 8, 4, 4), torch.contiguous_format),
    ((9, 5, 7, 7), torch.contiguous_format),
    ((300, 3, 16, 2), torch.contiguous_format),
    ((300, 3, 16, 2), torch.channels_last),
    ((6, 12, 1, 1), torch.contiguous_format),
    ((6, 12), torch.contiguous_format),
    ((6, 4, 5), torch.contiguous_format),
    ((6, 6, 2, 3, 2), torch.contiguous_format),
    ((6, 6, 2, 3, 2), torch.channels_last_3d),
]


def kernels_on(device: torch.device) -> GroupBatchNorm:
    return GroupBatchNorm(device) if device.type == "cuda" else GroupBatchNorm(CPU, EmulatedProgram, 16)


def noise(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5).to(device, dtype)


def worker_by_worker(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    outputs, statistics = [], []
    for part in x.chunk(WORKERS):
        mean, variance = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        outputs.append(
            F.batch_norm(part, mean, variance, weight, bias, training=True, momentum=1.0, eps=0.01)
        )
        statistics.append((mean, variance))
    means, variances = map(torch.stack, zip(*statistics, strict=True))
    return torch.cat(outputs), means, variances


def with_gradients(
    of: Callable[..., tuple[Tensor, Tensor, Tensor]], *leaves: Tensor | None, along: Tensor
) -> list[Tensor]:
    mine = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    y, mean, variance = of(*mine)
    assert not mean.requires_grad
    assert not variance.requires_grad
    return [y, mean, variance, *torch.autograd.grad(y, [leaf for leaf in mine if leaf is not None], along)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "order"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_outputs_statistics_and_gradients_are_those_of_each_worker(
    shape: tuple[int, ...], order: torch.memory_format, affine: bool, device: torch.device
) -> None:
    x, along = (noise(shape, seed, device, torch.float64).to(memory_format=order) for seed in (1, 2))
    weight, bias = (noise(shape[1:2], seed, device, torch.float64) if affine else None for seed in (3, 4))
    kernels = kernels_on(device)

    def at_once(x: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return kernels(x, WORKERS, *affine, 0.01)

    found = with_gradients(at_once, x, weight, bias, along=along)
    expected = with_gradients(worker_by_worker, x, weight, bias, along=along)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    assert found[0].is_contiguous(memory_format=order)
    again = with_gradients(at_once, x, weight, bias, along=along)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_other_formats_are_rounded_once(
    dtype: torch.dtype, most: float, order: torch.memory_format, device: torch.device
) -> None:
    if dtype == torch.float16 and device == CPU:
        pytest.skip("its conversions are a GPU's own instructions")
    shape = (12, 16, 6, 5)
    x, along = (noise(shape, seed, device, dtype).to(memory_format=order) for seed in (1, 2))
    weight, bias = (noise((16,), seed, device, torch.float32) for seed in (3, 4))
    kernels = kernels_on(device)
    found = with_gradients(lambda *of: kernels(of[0], WORKERS, *of[1:], 0.01), x, weight, bias, along=along)
    wide = [of.double() for of in (x, weight, bias)]
    expected = with_gradients(worker_by_worker, *wide, along=along.double())
    assert [of.dtype for of in found] == [dtype, torch.float32, torch.float32, dtype, *[torch.float32] * 2]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= most * other.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_images_that_lie_anyhow(device: torch.device) -> None:
    """A slice, a transposed one, one that does not begin at a multiple of 16 bytes; a gradient that is expanded."""
    kernels = kernels_on(device)
    whole = noise((7, 8, 4, 5), 1, device, torch.float64)
    places = (
        whole[1:],
        whole[:6].transpose(2, 3),
        whole[:6, :, :, 1:],
        whole.flatten()[1:961].view(6, 8, 4, 5),
    )
    for x in places:
        along = torch.ones((), dtype=torch.float64, device=device).expand_as(x)
        found = with_gradients(lambda x: kernels(x, WORKERS, None, None, 0.01), x, along=along)
        expected = with_gradients(lambda x: worker_by_worker(x, None, None), x, along=along)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 1e-12


def test_large_means_and_an_outlier_in_front_cost_no_digits() -> None:
    x = noise((6, 4, 32, 32), 1, CPU, torch.float32) + 1000
    x[:, :, 0, 0] = -5000
    kernels = kernels_on(CPU)
    _, mean, variance = kernels(x, WORKERS, None, None, 0.01)
    _, means, variances = worker_by_worker(x.double(), None, None)
    assert (mean - means).abs().max() <= 1e-6 * 1000
    assert ((variance - variances) / variances).abs().max() <= 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_of_a_group_leaves_the_same_statistics(device: torch.device) -> None:
    images, dtype = noise((8, 3, 5, 5), 1, device, torch.float64), torch.float64
    found, calls = [], []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(arguments[1])
        return kernels_on(device)(*arguments)

    for kernels in (None, counted):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
        model.to(device, dtype)
        group = Group(device)
        group.batch_norm = kernels
        statistics = running_statistics(model, Solo(), None, group)
        for sizes in ([2, 2, 2, 2], [3, 3], [3, 1]):  # unequal: one after the other
            group.begin(sizes, range(len(sizes)))
            model(images[: sum(sizes)]).square().sum().backward()
            statistics.after_forward()
        statistics.step(8)
        statistics.publish()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert calls == [4, 4, 2, 2]
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-12 * (1 + other.abs().max())


@pytest.mark.skipif(bool(why_not()), reason="needs NVRTC")
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_all_variants_compile_for_gpus(architecture: str) -> None:
    source = batch_norm._SOURCE.read_text()
    for dtype, number in batch_norm._TYPES.items():
        for last in (0, 1):
            constants = {"TYPE": number, "VECTOR": 16 // dtype.itemsize, "LAST": last, "THREADS": 256}
            binary = compile_cuda(source, constants, architecture)
            assert binary.startswith(b"\x7fELF")
            assert b"input_gradient" in binary


@pytest.mark.parametrize("kernel", ["statistics", "normalize", "gradients", "input_gradient"])
def test_a_gpu_that_computes_something_else_is_found_out(kernel: str) -> None:
    class Wrong(EmulatedProgram):
        def launch(self, name: str, grid: Any, block: Any, *arguments: Any) -> None:
            if name == kernel:
                grid = *grid[:2], grid[2] - 1  # not the last worker
                [of for of in arguments if isinstance(of, Tensor)][-1].zero_()
            super().launch(name, grid, block, *arguments)

    with pytest.raises(RuntimeError, match=r"batch norm of several workers is .* away from torch's"):
        GroupBatchNorm(CPU, Wrong, 16).prove(torch.float32, channels_last=True)
    GroupBatchNorm(CPU, EmulatedProgram, 16).prove(torch.float32, channels_last=True)


def test_without_the_bindings_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    kernels, why = proved_batch_norm(torch.device("cuda"), torch.float32, True)
    assert kernels is None
    assert "NVIDIA's cuda-bindings, and NVRTC of the same CUDA, are needed" in why


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_run_without_them_says_so_or_refuses(reproducible: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bits must not depend on what a machine has installed."""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    recipe = SimpleNamespace(compile=False, reproducible=reproducible, together=2, precision="fp32")
    forward = SimpleNamespace(
        device=torch.device("cuda"),
        recipe=recipe,
        model=nn.BatchNorm2d(3),
        memory_format=torch.channels_last,
        group=Group(),
    )
    find = partial(Forward._find_batch_norm, forward)
    if reproducible:
        with pytest.raises(
            UserError, match=r"--together 2: no kernel for batch norm of several .*: mend that"
        ):
            find()
    else:
        find()
        assert forward.group.batch_norm is None
        assert "computed for one after the other, which takes longer" in forward.untold


@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda", 0), id="cuda", marks=GPU)])
def test_it_can_be_recorded_and_does_not_wait(device: torch.device) -> None:
    kernels = kernels_on(device)
    x = noise((64, 64, 28, 28), 1, device, torch.bfloat16).to(memory_format=torch.channels_last)
    weight, bias = (noise((64,), seed, device, torch.float32).requires_grad_() for seed in (3, 4))
    x.requires_grad_()

    def work() -> list[Tensor]:
        y, mean, variance = kernels(x, 8, weight, bias, 1e-5)
        return [y, mean, variance, *torch.autograd.grad(y, (x, weight, bias), x.detach())]

    work()
    with without_waiting(device):
        expected = work()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = work()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
