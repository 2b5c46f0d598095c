"""How long an exchange takes by its size: t = α + β n, the latency and the seconds per byte of a network.

Hockney's model of a message; of an allreduce the two are those of the whole algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AlphaBeta:
    """`alpha` in seconds, `beta` in seconds per byte; `error` is the root mean square of the relative deviations."""

    alpha: float
    beta: float
    error: float

    def seconds(self, size: float) -> float:
        """For so many bytes."""
        return self.alpha + self.beta * size


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> AlphaBeta:
    """The line through times of messages of so many bytes, neither part below 0; relative deviations count alike.

    ValueError for fewer than two sizes, or a time that is not positive.
    """
    if len(set(sizes)) < 2 or min(seconds) <= 0:
        raise ValueError("a line needs two sizes and times above 0")
    n, t = np.asarray(sizes, float), np.asarray(seconds, float)
    rows = np.stack([1 / t, n / t], 1)
    (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones(len(t)), rcond=None)
    if alpha < 0 or beta < 0:  # then the best one has a 0 there
        column = rows[:, 1] if alpha < 0 else rows[:, 0]
        only = float(column.sum() / (column @ column))
        alpha, beta = (0.0, only) if alpha < 0 else (only, 0.0)
    deviations = rows @ np.array([alpha, beta]) - 1
    return AlphaBeta(float(alpha), float(beta), float(np.sqrt(np.mean(deviations**2))))
