"""Running statistics of batch norm: one update per step over the virtual workers (docs/design.md 7).

    r ← (1 − m) r + (m / k_t) Σ_j s_j        s_j: batch statistics of virtual worker j, k_t: workers with images

torch updates once per forward, which with several virtual workers on a process is another average. Here every forward
writes s_j (momentum 1) into the layers' buffers and `after_forward` adds it up.

The update is linear. So in the float mode each process keeps its own share R_p, which sees only its own workers, and
r = Σ_p R_p is formed when somebody looks (`publish`). Rounding is not linear: in the reproducible mode Σ_j s_j is added
in fixed point at every step, and every process has the whole of r.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from hvd_lb.exact.fixed_point import FixedPointOverflow, FixedPointSum
from hvd_lb.training.models import batch_norms
from hvd_lb.world import World


def allow_single_values(model: nn.Module) -> None:
    """Lets batch norm train on one value per channel, where torch raises: one image, and a map of 1 × 1 pixel.

    The variance of one value is 0, so the layer gives β, nothing flows back through it, and its statistics are the
    value and 0.
    """
    for layer in batch_norms(model):
        layer.forward = MethodType(_forward_of_any_size, layer)  # type: ignore[method-assign]


def _forward_of_any_size(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    if not layer.training or x.numel() > x.shape[1]:
        return type(layer).forward(layer, x)
    with torch.no_grad():
        layer.running_mean.copy_(x.flatten())  # type: ignore[union-attr]
        layer.running_var.zero_()  # type: ignore[union-attr]
    zeros, ones = torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var)  # type: ignore[arg-type]
    return nn.functional.batch_norm(x * 0.0, zeros, ones, layer.weight, layer.bias, training=False)


def running_statistics(model: nn.Module, world: World, reproducible_terms: int | None) -> RunningStatistics:
    """Those of the float mode, or of the reproducible one with at most so many microbatches a sum."""
    if reproducible_terms is None or not batch_norms(model):
        return RunningStatistics(model, world)
    return ReproducibleStatistics(model, world, reproducible_terms)


class RunningStatistics:
    """Owns the running mean and variance of a model that trains under it; takes them over as they are now."""

    def __init__(self, model: nn.Module, world: World):
        self._world = world
        self._layers = batch_norms(model)
        self._momenta = [layer.momentum or 0.0 for layer in self._layers for _ in range(2)]
        for layer in self._layers:
            layer.momentum = 1.0
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers()]
        self._share = [torch.zeros_like(buffer) for buffer in self._buffers()]
        self.adopt()

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in self._layers for buffer in (layer.running_mean, layer.running_var)]  # type: ignore[misc]

    @torch.no_grad()
    def adopt(self) -> None:
        """Take the layers' buffers (equal on all processes: fresh, loaded or just published) as r."""
        for share, buffer in zip(self._share, self._buffers(), strict=True):
            if self._world.rank == 0:
                share.copy_(buffer)
            else:
                share.zero_()

    @torch.no_grad()
    def after_forward(self, weight: float = 1.0) -> None:
        """Add the statistics, times `weight`, of the microbatch that just went forward in training mode."""
        if self._layers:
            torch._foreach_add_(self._sums, self._buffers(), alpha=weight)

    def synchronize(self) -> None:
        """Collective, before `step` or `replace`. `FixedPointOverflow` where a sum has to be gathered again."""

    @torch.no_grad()
    def step(self, active_workers: int) -> None:
        """One update, over the `active_workers` (k_t) virtual workers of all processes that had images."""
        if not self._layers:
            return
        torch._foreach_mul_(self._share, [1.0 - m for m in self._momenta])
        torch._foreach_mul_(self._sums, [m / active_workers for m in self._momenta])
        torch._foreach_add_(self._share, self._sums)
        self.discard()

    @torch.no_grad()
    def replace(self, weight: float) -> None:
        """Makes r the mean of what was added, `weight` being the weights of all processes added up."""
        torch._foreach_copy_(self._share, self._sums)
        torch._foreach_div_(self._share, weight)
        self.discard()

    @torch.no_grad()
    def discard(self) -> None:
        """Forget what was added since the last update."""
        if self._layers:
            torch._foreach_zero_(self._sums)

    @torch.no_grad()
    def publish(self, steps: int) -> None:
        """Put r into the layers' buffers of every process, for evaluation and checkpoints; collective."""
        if not self._layers:
            return
        for buffer, whole in zip(self._buffers(), self._whole(), strict=True):
            buffer.copy_(whole)
        for layer in self._layers:
            layer.num_batches_tracked.fill_(steps)  # type: ignore[union-attr]
        self.adopt()

    def _whole(self) -> list[Tensor]:
        """r = Σ_p R_p."""
        flat = torch.cat([share.flatten() for share in self._share])
        self._world.allreduce(flat, "hvd_lb.batch_norm")
        parts = flat.split([share.numel() for share in self._share])
        return [part.view_as(share) for part, share in zip(parts, self._share, strict=True)]


class ReproducibleStatistics(RunningStatistics):
    """The same bits for every division of virtual workers among processes."""

    def __init__(self, model: nn.Module, world: World, terms: int):
        super().__init__(model, world)
        self._sum = FixedPointSum(self._sums, terms, "hvd_lb.batch_norm")

    @property
    def exponents(self) -> list[int]:
        """Of the next sum; part of a checkpoint."""
        return self._sum.exponents

    @exponents.setter
    def exponents(self, exponents: list[int]) -> None:
        self._sum.exponents = exponents

    @torch.no_grad()
    def adopt(self) -> None:
        torch._foreach_copy_(self._share, self._buffers())

    @torch.no_grad()
    def after_forward(self, weight: float = 1.0) -> None:
        for index, buffer in enumerate(self._buffers()):
            self._sum.add(index, buffer if weight == 1 else buffer * weight)

    def synchronize(self) -> None:
        self._sum.start(self._world)
        _, overflowed = self._sum.finish(self._sums)
        if overflowed:
            raise FixedPointOverflow(
                "batch norm's statistics grew too much since the last step: take it again"
            )

    def discard(self) -> None:
        super().discard()
        if not self._sum.empty:
            self._sum.discard()

    def _whole(self) -> list[Tensor]:
        return self._share
