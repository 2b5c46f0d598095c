"""The gradient noise scale: the minibatch beyond which more images buy little (McCandlish et al., arXiv 1812.06162).

B = tr Σ / |G|², Σ the covariance of the gradients of single images and G the true gradient. From the norms of two
gradients of the same step, over b and B images (appendix A.1), both parts without bias:

    |G|²  ≈ (B |g_B|² − b |g_b|²) / (B − b)
    tr Σ  ≈ (|g_b|² − |g_B|²) / (1/b − 1/B)

The small gradient is that of the first virtual worker of the run, or of the first group of them, the large one that
of the step: neither depends on the number of processes. Their quotient would be biased in each step, so means over the
last steps are divided; Fieller's interval says how far the quotient is known.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

EVERY = 16
"""Steps from one whose norms are taken to the next: so their cost on CPUs is small beside the smallest networks."""
_STEPS = 100  # so many of those count; weights, and with them the scale, change slowly against that
_LEAST = 10  # of fewer nothing is said
_NORMAL = 1.96  # an interval that holds 95 %


@dataclass(frozen=True)
class NoiseEstimate:
    """Images. None: the gradient cannot be told from noise yet, so any number is possible."""

    value: float | None
    low: float
    high: float | None


@dataclass(frozen=True)
class _Step:
    own: Tensor
    own_images: int
    sum: Tensor
    images: int


class NoiseScale:
    """Takes the squared norms of each step, which stay on their device until somebody asks."""

    def __init__(self, steps: int = _STEPS):
        self.every = EVERY
        self._waiting: list[_Step] = []
        self._parts: deque[tuple[float, float]] = deque(maxlen=steps)  # tr Σ and |G|² of each step

    def due(self, step: int) -> bool:
        """Whether the norms of this step are taken."""
        return step % self.every == 0

    def add(self, own: Tensor, own_images: int, total: Tensor, images: int) -> None:
        """Squared norms of two sums of gradients: over `own_images` of a step, and over all of its images."""
        if own_images < images:
            self._waiting.append(_Step(own, own_images, total, images))

    def estimate(self) -> NoiseEstimate | None:
        """Of the last steps; None while they are too few. Waits for the device."""
        if self._waiting:
            norms = torch.stack([part for step in self._waiting for part in (step.own, step.sum)]).tolist()
            for step, own, total in zip(self._waiting, norms[::2], norms[1::2], strict=True):
                if math.isfinite(own) and math.isfinite(total):  # the loss scaler leaves such steps out
                    self._parts.append(_unbiased(own, step.own_images, total, step.images))
            self._waiting.clear()
        return quotient(list(self._parts)) if len(self._parts) >= _LEAST else None


def _unbiased(own: float, small: int, total: float, large: int) -> tuple[float, float]:
    """tr Σ and |G|² of a step."""
    own, total = own / small**2, total / large**2  # of means
    return (own - total) / (1 / small - 1 / large), (large * total - small * own) / (large - small)


def quotient(parts: list[tuple[float, float]]) -> NoiseEstimate:
    """Of the means, with Fieller's 95 % interval."""
    n = len(parts)
    s, g = (sum(part[index] for part in parts) / n for index in (0, 1))
    ss, sg, gg = (
        sum((part[i] - (s, g)[i]) * (part[j] - (s, g)[j]) for part in parts) / (n - 1) / n * _NORMAL**2
        for i, j in ((0, 0), (0, 1), (1, 1))
    )
    # Those r whose s − r g is not told from 0: a r² − 2 b r + c ≤ 0.
    a, b, c = g * g - gg, s * g - sg, s * s - ss
    root = math.sqrt(max(0.0, b * b - a * c))
    if a > 0 and g > 0:
        return NoiseEstimate(max(0.0, s / g), max(0.0, (b - root) / a), max(0.0, (b + root) / a))
    # The gradient is not told from 0: the scale is at least the positive end, where there is one.
    low = max(0.0, c / (b + root)) if b + root > 0 else 0.0
    return NoiseEstimate(None, low, None)
