"""Batch norm of several virtual workers at once on a GPU, each over its own images ("ghost" statistics).

torch's kernels are called for each worker by itself, on a slice of the batch, and what they make is put together after:
with 32 images a worker that takes longer than the arithmetic. Here three kernels do it forward, and three backward, for
all workers together (batch_norm.cu).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hvd_lb.kernels.program import Program, why_not

_SOURCE = files(__package__).joinpath("batch_norm.cu")
_TYPES = {torch.float64: 64, torch.float32: 32, torch.float16: 16, torch.bfloat16: 1}
# Bytes that a thread takes at once.
_ACCESS = 16
# Threads of a block, and of them side by side in channels; how many blocks keep any GPU busy; parts (of up to 16 bytes)
# that are worth a thread; threads that add up splits.
_THREADS, _ACROSS, _BLOCKS, _LEAST, _DOWN = 256, 32, 1024, 4, 8
# What results may differ by from those of fp64, of the largest: their rounding.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Launcher(Protocol):
    """Compiled kernels; a `Program`."""

    def launch(
        self, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], *arguments: Any
    ) -> None: ...


class GroupBatchNorm:
    """Batch norm in training mode of groups of virtual workers with equally many images.

    `RuntimeError` where kernels cannot be compiled, or compute something else than torch: each variant of them is held
    against that before it is used.
    """

    def __init__(
        self,
        device: torch.device,
        compiled: Callable[[str, dict[str, int], torch.device], Launcher] = Program,
        threads: int = _THREADS,
    ):
        self._device, self._compiled, self._threads = device, compiled, threads
        self._variants: dict[tuple[torch.dtype, int, bool], Launcher] = {}

    def __call__(
        self, x: Tensor, workers: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y as x (workers · n, C, …), and of each worker mean and unbiased variance (workers, C).

        There is more than one value of each channel and worker.
        """
        wide = _wide(x.dtype)
        weight = x.new_ones(x.shape[1], dtype=wide) if weight is None else weight.to(wide)
        bias = x.new_zeros(x.shape[1], dtype=wide) if bias is None else bias.to(wide)
        y, mean, variance = _Function.apply(self, x, workers, weight, bias, float(eps))
        return y, mean, variance

    def prove(self, dtype: torch.dtype, channels_last: bool) -> None:
        """`RuntimeError`, as above, for the kernels that most layers need."""
        self._variant(dtype, _ACCESS // dtype.itemsize, channels_last)

    def forward(
        self, x: Tensor, workers: int, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, and of each worker mean, 1/σ and unbiased variance; x is contiguous, in some order, and aligned."""
        layout, y = _Layout.of(x, workers), torch.empty_like(x)
        mean, inverse, variance = weight.new_empty(3, workers, layout.channels)
        sums = self._summed("statistics", 3, layout, x, like=weight)
        self._launch_small("finish_statistics", layout, sums, mean, inverse, variance, eps=eps)
        self._launch("normalize", layout, x, mean, inverse, weight, bias, y)
        return y, mean, inverse, variance

    def backward(
        self, x: Tensor, dy: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        layout, dx = _Layout.of(x, len(mean)), torch.empty_like(x)
        dy = _aligned(dy.contiguous(memory_format=_order(x)))
        sums = self._summed("gradients", 2, layout, x, dy, mean, like=mean)
        of_workers = mean.new_empty(2, *mean.shape)
        self._launch_small("finish_gradients", layout, sums, inverse, *of_workers)
        self._launch("input_gradient", layout, x, dy, mean, inverse, weight, *of_workers, dx)
        of_weight, of_bias = of_workers.sum(1)
        return dx, of_weight, of_bias

    def _summed(self, name: str, numbers: int, layout: _Layout, *tensors: Tensor, like: Tensor) -> Tensor:
        """So many `numbers` of each worker, share of its rows, and channel."""
        splits = self._grid(layout)[0][1]
        sums = like.new_empty(layout.workers, splits, layout.channels, numbers)
        self._launch(name, layout, *tensors, sums)
        return sums

    def _launch(self, name: str, layout: _Layout, *tensors: Tensor) -> None:
        grid, block = self._grid(layout)
        shape = layout.rows, layout.channels, layout.positions
        self._kernels(layout).launch(name, grid, block, *tensors, *shape)

    def _launch_small(
        self, name: str, layout: _Layout, sums: Tensor, *tensors: Tensor, **more: float
    ) -> None:
        """A column of threads for each worker and channel, whose splits they share."""
        down = min(_DOWN, self._threads)
        across = self._threads // down
        grid = -(-layout.workers * layout.channels // across), 1, 1
        shape = sums.shape[1], layout.channels, layout.workers
        self._kernels(layout).launch(name, grid, (across, down, 1), sums, *tensors, *shape, *more.values())

    def _grid(self, layout: _Layout) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Blocks and threads, the same on every GPU: they decide in which order is added."""
        across, blocks, parts = 1, layout.channels, layout.rows // layout.vector
        if layout.last:
            vectors, parts = layout.channels // layout.vector, layout.rows
            across = min(_ACROSS, self._threads, 1 << (vectors - 1).bit_length())
            blocks = -(-vectors // across)
        down = self._threads // across
        splits = min(-(-_BLOCKS // (blocks * layout.workers)), parts // (down * _LEAST))
        return (blocks, max(1, splits), layout.workers), (across, down, 1)

    def _kernels(self, layout: _Layout) -> Launcher:
        return self._variant(layout.dtype, layout.vector, layout.last)

    def _variant(self, dtype: torch.dtype, vector: int, last: bool) -> Launcher:
        key = dtype, vector, last
        if key not in self._variants:
            constants = {
                "TYPE": _TYPES[dtype],
                "VECTOR": vector,
                "LAST": int(last),
                "THREADS": self._threads,
            }
            self._variants[key] = self._compiled(_SOURCE.read_text(), constants, self._device)
            try:
                self._hold_against_torch(dtype, vector, last)
            except RuntimeError:
                del self._variants[key]
                raise
        return self._variants[key]

    @torch.no_grad()
    def _hold_against_torch(self, dtype: torch.dtype, vector: int, last: bool) -> None:
        workers, images, channels = 3, self._threads // 4, 3 * vector
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self._device)

        order = torch.channels_last if last else torch.contiguous_format
        shape = workers * images, channels, 33, vector
        x = (noise(*shape) + 1).to(dtype, memory_format=order)
        dy = (noise(*shape) + x).to(dtype, memory_format=order)
        weight, bias = noise(2, channels).to(_wide(dtype))
        y, mean, inverse, variance = self.forward(x, workers, weight, bias, 0.1)
        found = y, mean, variance, *self.backward(x, dy, mean, inverse, weight)
        with torch.enable_grad():
            x, weight, bias = (of.double().requires_grad_() for of in (x, weight, bias))
            parts = x.unflatten(0, (workers, images))
            var, middle = torch.var_mean(parts, (1, 3, 4), correction=0, keepdim=True)
            factor, shift = (of.view(-1, 1, 1) for of in (weight, bias))
            y = ((parts - middle) * torch.rsqrt(var + 0.1) * factor + shift).flatten(0, 1)
            of_inputs = torch.autograd.grad(y, (x, weight, bias), dy.double())
        values = x.numel() // middle.numel()
        expected = y, middle.view_as(mean), var.view_as(mean) * (values / (values - 1)), *of_inputs
        apart = [
            (one - other).abs().max() / other.abs().max() for one, other in zip(found, expected, strict=True)
        ]
        largest = float(torch.stack(apart).max())
        if not largest <= _TOLERANCE[dtype]:
            raise RuntimeError(f"batch norm of several workers is {largest:.1e} away from torch's")


def proved_batch_norm(
    device: torch.device, dtype: torch.dtype, channels_last: bool
) -> tuple[GroupBatchNorm | None, str]:
    """That for activations of such a kind, or why there is none."""
    why = why_not()
    if not why:
        try:
            kernels = GroupBatchNorm(device)
            kernels.prove(dtype, channels_last)
            return kernels, ""
        except RuntimeError as error:
            why = " ".join(str(error).split())
    return None, f"no kernel for batch norm of several virtual workers at once ({why})"


class _Layout(NamedTuple):
    """Of x, whose channels are `last` in memory or not; a thread takes `vector` values at once."""

    dtype: torch.dtype
    workers: int
    rows: int  # values of a channel in the images of a worker
    channels: int
    positions: int  # of an image
    last: bool
    vector: int

    @classmethod
    def of(cls, x: Tensor, workers: int) -> _Layout:
        images, channels = x.shape[:2]
        positions = math.prod(x.shape[2:])
        last = positions == 1 or _order(x) != torch.contiguous_format
        vector = math.gcd(_ACCESS // x.itemsize, channels if last else positions)
        return cls(x.dtype, workers, images // workers * positions, channels, positions, last, vector)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, of: GroupBatchNorm, x: Tensor, workers: int, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _aligned(x.contiguous(memory_format=_order(x)))
        y, mean, inverse, variance = of.forward(x, workers, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, weight)
        ctx.of = of
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        dx, of_weight, of_bias = ctx.of.backward(x, dy, mean, inverse, weight)
        return None, dx, None, of_weight, of_bias, None


def _order(x: Tensor) -> torch.memory_format:
    """In which images lie, or are to."""
    if not x.is_contiguous():
        for dimensions, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dimensions and x.is_contiguous(memory_format=order):
                return order
    return torch.contiguous_format


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _ACCESS else x


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums are made, and weights are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32
