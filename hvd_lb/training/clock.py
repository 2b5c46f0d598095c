"""Where the time of a run goes: steps and waiting for data, without what lies between; and periods by the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hvd_lb.data.loading.contract import Loader


class Timer:
    """Called, it tells whether so many seconds have passed since it was started last."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> bool:
        return time.monotonic() - self._start >= self.seconds


class StepClock:
    """Time spent in steps, without what lies between them (evaluation, checkpoints)."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._start, self._wait_start = time.perf_counter(), loader.wait_seconds

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them spent waiting for data."""
        now, wait_now = time.perf_counter(), self._loader.wait_seconds
        lap = now - self._start, wait_now - self._wait_start
        self._start, self._wait_start = now, wait_now
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before
