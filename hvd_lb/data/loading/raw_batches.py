"""Reads the images of microbatches ahead of the decoder: in order, by as many threads as help, without a barrier.

How far ahead is bounded in seconds, as a file system may pause for some, and in bytes, as memory is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from hvd_lb.data.decoding.stand_in import Content, RawBatch
from hvd_lb.data.files.threads import MOST_THREADS, InOrder
from hvd_lb.plan.augment import Microbatch

AHEAD_SECONDS = 2.0
"""So much of what the decoder takes is read ahead."""
AHEAD_BYTES = 256 << 20
"""At most so much in a process, besides the two next microbatches."""

_WINDOW_SECONDS = 1.0
_OVERHEAD = 200  # bytes of an array without its contents


class RawBatches(Iterator[RawBatch]):
    """Iterates over the microbatches with what `read` gives for their image ids, each of 1 to `batch_size` images.

    `threads` read, or, if it is not given, as many as help: `start` at first, at most `most`. What `read` or
    `microbatches` raises comes after the microbatches before it.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Iterable[Content]],
        microbatches: Iterable[Microbatch],
        batch_size: int,
        *,
        threads: int | None = None,
        start: int = 1,
        most: int = MOST_THREADS,
    ) -> None:
        self._batch_size = batch_size
        self._begun: deque[Microbatch] = deque()
        self._used = _Rate()
        self._contents: InOrder[int, Content] = InOrder(
            lambda ids: read(np.array(ids)),
            self._ids(microbatches),
            "hvd-lb read",
            threads=threads,
            start=start,
            most=most,
            room=self._room,
            weigh=lambda content: _OVERHEAD + getattr(content, "nbytes", 0),
        )
        self._batches: Iterator[RawBatch] = self._joined()

    def __next__(self) -> RawBatch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the threads; see `InOrder`."""
        self._contents.close()
        self._batches = iter(())  # it held this object

    def _ids(self, microbatches: Iterable[Microbatch]) -> Iterator[int]:
        for microbatch in microbatches:
            ids = microbatch.image_ids
            if not 1 <= len(ids) <= self._batch_size:
                raise ValueError(f"a microbatch of {len(ids)} images; expected 1 to {self._batch_size}")
            self._begun.append(microbatch)
            yield from ids.tolist()

    def _joined(self) -> Iterator[RawBatch]:
        contents = iter(self._contents)
        for first in contents:
            microbatch = self._begun.popleft()
            count = len(microbatch.image_ids)
            batch = RawBatch(microbatch, [first, *islice(contents, count - 1)])
            self._used.add(count)
            yield batch

    def _room(self, ahead: int, held: int) -> bool:
        if ahead < 2 * self._batch_size:
            return True
        return held < AHEAD_BYTES and ahead < max(MOST_THREADS, AHEAD_SECONDS * self._used.a_second())


class _Rate:
    """How many are taken a second, over the last seconds in which any were: a pause tells nothing of the rate."""

    def __init__(self) -> None:
        self._last, self._seconds, self._count, self._before = time.perf_counter(), 0.0, 0, 0.0

    def add(self, count: int) -> None:
        now = time.perf_counter()
        self._seconds += min(now - self._last, _WINDOW_SECONDS)
        self._last = now
        self._count += count
        if self._seconds >= 2 * _WINDOW_SECONDS:
            self._before = self._count / self._seconds
            self._seconds, self._count = 0.0, 0

    def a_second(self) -> float:
        return max(self._before, self._count / max(self._seconds, _WINDOW_SECONDS))
