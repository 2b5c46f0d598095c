"""Which rank keeps the others waiting, by how much and why: from the times of all of them.

A rank's *own* time is what it waits for data and computes. Time in which it waits for others says nothing of itself:
the slowest rank waits least.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_lb.world.stages import Stage

_STAGES = {"data": Stage.DATA, "compute": Stage.COMPUTE, "network": Stage.NETWORK}
_RECORD_SECONDS = 10.0
# A straggler takes so many times the median and so much of a step more, in so many records one after the other.
_SLOWER, _SHARE, _RECORDS = 1.3, 0.1, 3


class RankTimes:
    """Adds up what ranks spent between records, for ranks on these `hosts`, which host so many `workers` each.

    A rank with more virtual workers than others is not slow by that: own times are compared per virtual worker.
    """

    def __init__(self, hosts: Sequence[str], workers: Sequence[int], every: float = _RECORD_SECONDS):
        self.hosts = self._hosts = hosts
        self._every = every
        self._workers = np.maximum(workers, 1)
        self._spent = np.zeros((len(_STAGES), len(hosts)))
        self._written = time.monotonic()
        self._slow: deque[np.ndarray] = deque(maxlen=_RECORDS)  # in each of the newest records: which ranks
        self._told: set[int] = set()

    def add(self, times: dict[str, Any]) -> tuple[dict[str, Any], list[str]] | None:
        """The record to write and new stragglers in words, when the last record is long enough ago.

        `times` are lists of seconds, by rank. A straggler is told once, and again when it was none meanwhile.
        """
        self._spent += [times[name] for name in _STAGES]
        now = time.monotonic()
        if now - self._written < self._every or len(self._hosts) < 2:
            return None
        spent, self._spent, self._written = self._spent, np.zeros_like(self._spent), now
        data, compute, network = spent / self._workers
        own = data + compute
        median, slowest = float(np.median(own)), int(own.argmax())
        record = {
            **{name: value for name, value in times.items() if name not in _STAGES},
            **{name: np.round(of, 3).tolist() for name, of in zip(_STAGES, spent, strict=True)},
            "median": median,
            "slowest": slowest,
            "host": self._hosts[slowest],
            "slower": float(own[slowest]) / max(median, 1e-9),
            # Nobody waits less for others than the exchange itself takes.
            "reason": _largest(_excess(data, slowest), _excess(compute, slowest), float(network.min())),
        }
        self._slow.append((own > _SLOWER * median) & (own - median > _SHARE * (own + network)))
        slow = {int(rank) for rank in np.flatnonzero(np.all(self._slow, axis=0))}
        stragglers = slow if len(self._slow) == _RECORDS else set()
        new, self._told = sorted(stragglers - self._told), stragglers
        return record, [
            f"rank {rank} on {self._hosts[rank]} is {own[rank] / max(median, 1e-9):.1f}× slower than the median: "
            f"{_STAGES[_largest(_excess(data, rank), _excess(compute, rank))]}"
            for rank in new
        ]


def _excess(times: np.ndarray, rank: int) -> float:
    return float(times[rank] - np.median(times))


def _largest(*excess: float) -> str:
    """The stage of the largest of these."""
    return max(zip(excess, _STAGES, strict=False))[1]
