"""Mixup and CutMix within a microbatch (Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899).

As torchvision's reference: each microbatch has one share λ from Beta(α, α), its images are mixed with those one place
before them, and with both methods each microbatch gets one of them, either as often. All is a function of (seed, step,
virtual worker), so it does not depend on processes or groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvd_lb.plan.counter import uniform

if TYPE_CHECKING:
    from torch import Tensor

# What a random number is for; beyond those of plan/augment.
_METHOD, _FIRST, _SECOND, _X, _Y = range(64, 69)
_TRIES = 1024


@dataclass(frozen=True)
class Targets:
    """The labels of a microbatch, int64 (b,); and those mixed in, with the share of the former."""

    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def loss(self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> Tensor:
        """That of the mixed labels, which is the mixture of the losses."""
        own = loss(logits, self.labels)
        if self.others is None:
            return own
        return self.share * own + (1 - self.share) * loss(logits, self.others)


@dataclass(frozen=True)
class Mixing:
    """With the α of each method; 0 leaves it out."""

    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, images: Tensor, labels: Tensor, step: int, worker: int) -> tuple[Tensor, Targets]:
        """Images (b, 3, S, S) and labels (b,) of a worker in a step, mixed; the given ones are left as they are."""
        if not (self.mixup or self.cutmix):
            return images, Targets(labels)
        cuts = bool(self.cutmix) and not (self.mixup and self._uniform(_METHOD, step, worker) < 0.5)
        share = self._beta(self.cutmix if cuts else self.mixup, step, worker)
        before = images.roll(1, 0)
        if cuts:
            images, share = self._cut(images, before, share, step, worker)
        else:
            images = share * images + (1 - share) * before
        return images, Targets(labels, labels.roll(1, 0), share)

    def _cut(
        self, images: Tensor, before: Tensor, share: float, step: int, worker: int
    ) -> tuple[Tensor, float]:
        """A rectangle of 1 − `share` of the area around a point of the image, as far as it lies inside."""
        height, width = images.shape[2:]
        x, y = (
            int(side * self._uniform(purpose, step, worker)) for side, purpose in ((width, _X), (height, _Y))
        )
        half = 0.5 * (1 - share) ** 0.5
        half_width, half_height = int(half * width), int(half * height)
        rows = slice(max(0, y - half_height), min(height, y + half_height))
        columns = slice(max(0, x - half_width), min(width, x + half_width))
        images = images.clone()
        images[:, :, rows, columns] = before[:, :, rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        return images, 1 - area / (width * height)

    def _uniform(self, purpose: int, step: int, worker: int) -> float:
        return float(uniform(self.seed, step, purpose, worker)[0])

    def _beta(self, alpha: float, step: int, worker: int) -> float:
        """From Beta(α, α), by Jöhnk's method (1964); in logarithms, as powers of small α underflow."""
        tries = np.arange(_TRIES, dtype=np.uint64)
        with np.errstate(divide="ignore"):
            first, second = (
                np.log(uniform(self.seed, step, purpose, worker, tries)) / alpha
                for purpose in (_FIRST, _SECOND)
            )
            fits = np.logaddexp(first, second) <= 0
        one = int(fits.argmax())
        if not fits[one] or not np.isfinite(first[one] + second[one]):  # with α ≤ 4 less than once in 10⁶
            return 0.5
        return float(np.exp(first[one] - np.logaddexp(first[one], second[one])))
