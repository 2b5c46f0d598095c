"""Many small pieces of work that may have to wait for a file system, or may not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

MOST_THREADS = 32
_TRIAL_SECONDS = 0.05


def in_threads(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """What `work` makes of each item, in order.

    The first ones are done in this thread: by the share of the time that they wait, as many threads do the others. On
    a file system that answers at once more than one would only get into each other's way (Python runs one at a time).
    """
    rest = iter(items)
    wall, busy = time.perf_counter(), time.thread_time()
    for item in rest:
        yield work(item)
        if time.perf_counter() - wall > _TRIAL_SECONDS:
            break
    share = (time.perf_counter() - wall) / max(time.thread_time() - busy, 1e-3)
    count = min(MOST_THREADS, round(share))
    if count <= 1:
        yield from map(work, rest)
        return
    with ThreadPoolExecutor(count, "hvd-lb index") as pool:
        yield from pool.map(work, rest)
