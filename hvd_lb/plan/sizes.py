"""Which size training images have in a step: some small ones first, as long as each other, and at last the right one.

Progressive resizing, as in Howard's fast.ai runs on DAWNBench (2018) and Touvron et al. 2019 (arXiv 1906.06423): most
steps cost less, and evaluations are at the final size. A function of the step alone, which changes between epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSizes:
    """`sizes` in their order, in pixels, over the epochs of a run."""

    sizes: tuple[int, ...]
    epochs: int
    steps_per_epoch: int
    offset: int = 0  #: the step at which epoch 0 would have begun (`hvd_lb.plan.run_plan`)

    def __call__(self, step: int) -> int:
        return self.sizes[self._stage(step)]

    def stretches(self, start: int, end: int) -> Iterator[range]:
        """The steps `start` to `end` − 1 in parts of one size each."""
        while start < end:
            epoch = -(-(self._stage(start) + 1) * self.epochs // len(self.sizes))
            after = self.offset + epoch * self.steps_per_epoch
            stop = end if self._stage(start) == len(self.sizes) - 1 else min(end, after)
            yield range(start, stop)
            start = stop

    def _stage(self, step: int) -> int:
        epoch = (step - self.offset) // self.steps_per_epoch
        return min(epoch * len(self.sizes) // self.epochs, len(self.sizes) - 1)
