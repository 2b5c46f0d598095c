"""What this device takes for a microbatch of a run, and when backward fills each bucket, with the run's own parts.

What is measured are steps of the trainer with one virtual worker: their images come from the loader, and hooks of the
optimizer tell when the exchange of a bucket would begin. Loading is measured by the run's own loader.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.forecast.step import Compute, Filled
from hvd_lb.training.trainer import Trainer

_LEAST, _MOST = 4, 2000  # steps that are timed, after those that warm everything up
_BLOCKS = 8


@dataclass(frozen=True)
class MeasuredCompute:
    """`error` is the relative standard error of the times; `images` fewer than n where there was no time for n."""

    compute: Compute
    error: float
    microbatches: int
    images: int


@dataclass
class _Marks:
    """Moments of a step, as `_clock` gives them; of the exchanges by the buckets' numbers."""

    backward: Callable[[], float] | None = None
    update: Callable[[], float] | None = None
    exchanges: dict[int, Callable[[], float]] = field(default_factory=dict)


def measure_compute(trainer: Trainer, images: int, deadline: float) -> MeasuredCompute:
    """Of steps of `trainer`, whose recipe has one virtual worker, until `deadline` (of time.monotonic); at least some.

    The times are for the `images` of a microbatch of the run: in proportion, where the trainer's has fewer.
    """
    optimizer, now = trainer.state.optimizer, _clock(trainer.device)
    sizes: dict[int, int] = {}
    marks = _Marks()
    backward = optimizer.backward

    def marked(*arguments: Any, **named: Any) -> None:
        marks.backward = now()
        backward(*arguments, **named)
        marks.update = now()

    def begun(number: int, length: int) -> None:
        sizes[number] = length
        marks.exchanges[number] = now()

    optimizer.backward = marked  # type: ignore[method-assign]
    optimizer.on_exchange = begun
    trainer.model.train()
    warm = 3 if trainer.forward.recorder else 1  # a graph is recorded in the second, and first replayed
    times: list[tuple[float, float, float, dict[int, float]]] = []
    while len(times) < warm + _LEAST or (time.monotonic() < deadline and len(times) <= _MOST):
        with trainer.kernels(), trainer.batches() as batches:
            try:
                while len(times) < warm + _LEAST or (time.monotonic() < deadline and len(times) <= _MOST):
                    marks = _Marks()
                    began, waited = now(), batches.wait_seconds
                    trainer.train_step(batches)
                    done, waited = now(), batches.wait_seconds - waited
                    if trainer.device.type == "cuda":
                        torch.cuda.synchronize(trainer.device)
                    assert marks.backward
                    assert marks.update
                    start, end = marks.backward(), marks.update()
                    filled = {number: mark() - start for number, mark in marks.exchanges.items()}
                    times.append((start - began() - waited, end - start, done() - end, filled))
            except FixedPointOverflow:
                pass  # exponents are learnt once: the step is taken again, with images from there
    times = times[warm:]
    here = trainer.recipe.per_gpu_batch
    factor = images / here
    whole = [before + after for before, after, *_ in times]
    spread = _robust_spread(whole)
    # Of a run it is the mean that counts: some steps are slower, some of them by much, and hardly one is faster.
    mean = statistics.fmean
    backward_seconds = factor * mean(of[1] for of in times)
    compute = Compute(
        forward=factor * mean(of[0] for of in times),
        backward=backward_seconds,
        update=mean(of[2] for of in times),
        buckets=tuple(
            Filled(sizes[number], min(backward_seconds, factor * mean(of[3][number] for of in times)))
            for number in sorted(sizes)
        ),
        images=images,
        spread=spread,
    )
    return MeasuredCompute(compute, standard_error(whole), len(times), here)


def measure_loading(trainer: Trainer, deadline: float) -> float | None:
    """Images per second of the run's loader with nothing else to do; None where it ended at once."""
    with trainer.batches() as batches:
        next(batches)  # what starts up
        began, images = time.perf_counter(), 0
        for pixels, _ in batches:
            images += len(pixels)
            if time.monotonic() >= deadline:
                break
        seconds = time.perf_counter() - began
    return images / seconds if images and seconds > 0 else None


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of these values, in order, relative to it.

    A machine that is slower for a while is so for many steps in turn: they tell as little as one. So it is taken from
    the means of a few blocks of them, where that is more than what single values say ("batch means", Law and Kelton).
    """
    mean = statistics.mean(values)
    apart = _robust_spread(list(values)) / len(values) ** 0.5
    size = len(values) // _BLOCKS
    if size < 2:
        return apart
    blocks = [statistics.mean(values[number * size : (number + 1) * size]) for number in range(_BLOCKS)]
    return max(apart, statistics.stdev(blocks) / mean / _BLOCKS**0.5)


def _robust_spread(values: list[float]) -> float:
    """The relative standard deviation as the interquartile range tells it: a hiccup of the machine is not in it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.349 / middle


def _clock(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Called, a moment; the moment called, after synchronisation, in seconds from the first one."""
    if device.type != "cuda":

        def moment() -> Callable[[], float]:
            at = time.perf_counter()
            return lambda: at

        return moment
    first = torch.cuda.Event(enable_timing=True)
    first.record()

    def event() -> Callable[[], float]:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return lambda: first.elapsed_time(mark) / 1000

    return event
