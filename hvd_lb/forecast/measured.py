"""What this device takes for a microbatch of a run, and when backward fills each bucket, with the run's own parts.

A copy of the network is trained on noise by the optimizer of the run, whose hooks tell when the exchange of a bucket
would begin. The run is not touched. Loading is measured by the run's own loader.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.forecast.step import Compute, Filled
from hvd_lb.optim.distributed import DistributedOptimizer
from hvd_lb.optim.make import make_optimizer
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

_LEAST, _MOST = 3, 30  # microbatches that are timed, after the first, which warms everything up


@dataclass(frozen=True)
class MeasuredCompute:
    """`error` is the relative standard error of the times; `images` fewer than n where there was no time for n."""

    compute: Compute
    error: float
    microbatches: int
    images: int


def measure_compute(trainer: Trainer, images: int, deadline: float) -> MeasuredCompute:
    """Of microbatches of so many images, until `deadline` (of time.monotonic); at least some.

    The times are for the run's n images: in proportion, where `images` are fewer.
    """
    recipe = trainer.recipe
    model = copy.deepcopy(trainer.model).train()
    optimizer = DistributedOptimizer(
        make_optimizer(recipe, model, trainer.schedule(0)),
        model,
        world=Solo(),
        reproducible_terms=1 if recipe.reproducible else None,
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay, and with them the times
    forward = torch.compile(model) if recipe.compile else model
    size = recipe.image_size
    noise = torch.randn(images, 3, size, size, device=trainer.device, dtype=trainer.dtype)
    noise = noise.to(memory_format=trainer.memory_format)
    labels = torch.zeros(images, dtype=torch.int64, device=trainer.device)
    now = _clock(trainer.device)
    sizes: dict[int, int] = {}
    marks: list[dict[int, Callable[[], float]]] = []

    def begun(number: int, length: int) -> None:
        sizes[number] = length
        marks[-1][number] = now()

    optimizer.on_exchange = begun
    times: list[tuple[float, float, float, dict[int, float]]] = []
    with trainer.kernels():
        while len(times) <= _LEAST or (time.monotonic() < deadline and len(times) <= _MOST):
            marks.append({})
            began = now()
            with trainer.autocast():
                loss = trainer.loss(forward(noise), labels)
            backward = now()
            loss.backward()
            update = now()
            try:
                optimizer.step(global_images=images)
            except FixedPointOverflow:  # the exponents of noise are learnt once
                if len(marks) > _MOST:
                    raise
                continue
            optimizer.zero_grad()
            done = now()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            start = backward()
            times.append(
                (
                    start - began(),
                    update() - start,
                    done() - update(),
                    {number: mark() - start for number, mark in marks[-1].items()},
                )
            )
    times = times[1:]
    factor = recipe.per_gpu_batch / images
    spread = _robust_spread([before + after for before, after, *_ in times])
    median = statistics.median
    backward_seconds = factor * median(of[1] for of in times)
    compute = Compute(
        forward=factor * median(of[0] for of in times),
        backward=backward_seconds,
        update=median(of[2] for of in times),
        buckets=tuple(
            Filled(sizes[number], min(backward_seconds, factor * median(of[3][number] for of in times)))
            for number in sorted(sizes)
        ),
        images=recipe.per_gpu_batch,
        spread=spread,
    )
    return MeasuredCompute(compute, spread / len(times) ** 0.5, len(times), images)


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
