"""Sides of a benchmark that take turns, so that a busy machine slows all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

import hvd_lb as lb

Step = Callable[[], object]


def interleaved(
    sides: Mapping[str, Step], turns: int, warm_up: int, seconds: float = math.inf
) -> dict[str, float]:
    """Median milliseconds of each side over so many turns, or fewer where they take longer than `seconds`, but one."""
    world = lb.current()
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for turn in range(warm_up + turns):
        for name, run in sides.items():
            world.barrier()
            start = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(1000 * (time.perf_counter() - start))
        late = torch.tensor([float(time.perf_counter() - began > seconds)])
        if world.maximum_async(late, "late").wait() and turn >= warm_up:
            break
    return {name: statistics.median(values) for name, values in times.items()}
