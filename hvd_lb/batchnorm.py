"""Running statistics of batch norm: one update per step over the virtual workers (docs/design.md 7).

    r ← (1 − m) r + (m / k_t) Σ_j s_j        s_j: batch statistics of virtual worker j, k_t: workers with images

torch updates once per forward, which with several virtual workers on a process is another average. Here every forward
writes s_j (momentum 1) into the layers' buffers and `after_forward` adds it up. The update is linear, so each process
keeps its own share R_p, which sees only its own workers; r = Σ_p R_p is formed when somebody looks (`publish`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_lb.models import batch_norms
from hvd_lb.world import World


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
    def after_forward(self) -> None:
        """Add the statistics of the microbatch that just went forward in training mode."""
        if self._layers:
            torch._foreach_add_(self._sums, self._buffers())

    @torch.no_grad()
    def step(self, active_workers: int) -> None:
        """One update, over the `active_workers` (k_t) virtual workers of all processes that had images."""
        if not self._layers:
            return
        torch._foreach_mul_(self._share, [1.0 - m for m in self._momenta])
        torch._foreach_mul_(self._sums, [m / active_workers for m in self._momenta])
        torch._foreach_add_(self._share, self._sums)
        torch._foreach_zero_(self._sums)

    @torch.no_grad()
    def publish(self, steps: int) -> None:
        """Form r = Σ_p R_p in the layers' buffers of every process, for evaluation and checkpoints."""
        if not self._layers:
            return
        flat = torch.cat([share.flatten() for share in self._share])
        self._world.allreduce(flat, "hvd_lb.batch_norm")
        offset = 0
        for buffer in self._buffers():
            buffer.copy_(flat[offset : offset + buffer.numel()].view_as(buffer))
            offset += buffer.numel()
        for layer in self._layers:
            layer.num_batches_tracked.fill_(steps)  # type: ignore[union-attr]
        self.adopt()
