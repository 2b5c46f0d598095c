"""A rehearsal of a run on one process: how long would a step and an epoch take here, found out within a time budget.

The steps are the trainer's own. A step of 256 virtual workers may be longer than the budget: then its first
microbatches are timed and the step is given up. Where not even one microbatch would fit, a few images are timed.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hvd_lb.data.loading.shared_pixels import shared
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.forecast.measured import MeasuredCompute, measure_compute, measure_loading
from hvd_lb.machine.cpu import usable_cores
from hvd_lb.machine.placement import loader_threads
from hvd_lb.machine.process import peak_memory
from hvd_lb.optim.noise_scale import NoiseEstimate
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.resolve import Resolved
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

# Fewer microbatches than this say little, as the first ones are slow.
_ENOUGH_MICROBATCHES = 6
# So many are timed for a forecast, the first one included.
_TIMED_MICROBATCHES = 5
# Enough for batch norm, few enough for a slow machine.
_PROBED_IMAGES = 2


@dataclass(frozen=True)
class Rehearsal:
    """What was measured. Times in seconds, memory in bytes; `losses` are means over the images of whole steps.

    Where no whole step was timed, `step_seconds` is that of its microbatches added up; where no microbatch was,
    `microbatch_seconds` is in proportion to the time of `probed` images. `together` is the number of virtual workers
    that were computed as one batch in the end; each counts as a microbatch. `noise` is the gradient noise scale of
    these first steps.
    """

    microbatches: int
    microbatch_seconds: float
    steps: int
    step_seconds: float
    losses: list[float]
    peak_memory: int
    probed: int = 0
    together: int = 1
    noise: NoiseEstimate | None = None


class _BudgetSpent(Exception):  # noqa: N818 - not an error: how a step is given up
    pass


class _Stopwatch(SilentObserver):
    """Times microbatches, and ends a step that will not fit into what is left of the budget."""

    def __init__(self, deadline: float, on_microbatch: Callable[[int, int, int], None]):
        self.seconds: list[float] = []
        self.chosen = 0  # microbatches before it was known how many workers are best computed together
        self._deadline, self._on_microbatch = deadline, on_microbatch
        self.start()

    def start(self) -> None:
        self._last, self._done = time.perf_counter(), 0

    def together(self, record: dict[str, Any]) -> None:
        self.chosen = len(self.seconds)

    def microbatch(self, step: int, done: int, of: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        count = done - self._done if done > self._done else done  # of the next step
        self.seconds += [(now - self._last) / count] * count
        self._last, self._done = now, done
        self._on_microbatch(step, done, of)
        left = self._deadline - time.monotonic()
        enough = len(self.seconds) >= _ENOUGH_MICROBATCHES
        needed = (of - done) * self.typical()
        if done < of and ((enough and needed > left) or self.typical() > left):
            raise _BudgetSpent

    def typical(self) -> float:
        """Median of the microbatches; the very first, which warms everything up, counts only when it is alone."""
        return statistics.median(self.seconds[self.chosen or 1 :] or self.seconds)


def rehearse(
    resolved: Resolved,
    *,
    device: torch.device,
    threads: int,
    deadline: float,
    on_microbatch: Callable[[int, int, int], None] = lambda step, done, of: None,
) -> Rehearsal:
    """Take steps until the next whole one would end after `deadline` (of time.monotonic)."""
    watch = _Stopwatch(deadline, on_microbatch)
    recipe = resolved.recipe.model_copy(update={"progressive_size": ()})  # whose steps take longest
    resolved = replace(resolved, recipe=recipe)
    trainer = _trainer(resolved, device, threads, watch)
    trainer.model.train()
    images = min(recipe.per_gpu_batch, _PROBED_IMAGES)
    guess = _probe(trainer, images) * recipe.per_gpu_batch / images
    if time.monotonic() + guess > deadline:
        return Rehearsal(0, guess, 0, guess * recipe.gpus, [], peak_memory(str(device)), images)
    steps: list[float] = []
    chosen = 0  # steps before it was known how many workers are best computed together
    losses: list[float] = []
    spent = False
    while not spent and trainer.step < trainer.end:
        try:
            with trainer.kernels(), trainer.batches() as batches:
                watch.start()
                while trainer.step < trainer.end and not spent:
                    before = time.perf_counter()
                    trainer.train_step(batches)
                    losses.append(trainer.state.take_loss())
                    steps.append(time.perf_counter() - before)
                    if watch.chosen and not chosen:
                        chosen = len(steps)
                    spent = time.monotonic() + steps[-1] > deadline
        except FixedPointOverflow:
            pass  # the step is taken again
        except _BudgetSpent:
            spent = True
    typical = watch.typical()
    return Rehearsal(
        microbatches=len(watch.seconds),
        microbatch_seconds=typical,
        steps=len(steps),
        step_seconds=statistics.median(steps[chosen or 1 :] or steps) if steps else typical * recipe.gpus,
        losses=losses,
        peak_memory=peak_memory(str(device)),
        together=trainer.forward.group_size.size,
        noise=trainer.noise_scale.estimate() if trainer.noise_scale else None,
    )


def measure_device(
    resolved: Resolved,
    *,
    device: torch.device,
    threads: int,
    deadline: float,
    loads: bool,
    guess: float | None = None,
) -> tuple[MeasuredCompute, float | None, int | None]:
    """A microbatch in parts, images per second of the loader (if it `loads`), and peak memory on a GPU in bytes.

    `guess` is the seconds of a microbatch, if they are known: where there is no time for some, fewer images are timed.
    """
    images = resolved.recipe.per_gpu_batch
    few = min(images, _PROBED_IMAGES)
    if guess is None:
        guess = (
            _probe(_trainer(_alone(resolved, images), device, threads, SilentObserver()), few) * images / few
        )
    enough = time.monotonic() + _TIMED_MICROBATCHES * guess <= deadline
    alone = _alone(resolved, images if enough else few)
    trainer = _trainer(alone, device, threads, SilentObserver(), resolved.recipe.gpus)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    left = deadline - time.monotonic()
    measured = measure_compute(trainer, images, time.monotonic() + (0.7 if loads else 1) * left)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return measured, measure_loading(trainer, deadline) if loads else None, memory


def _alone(resolved: Resolved, images: int) -> Resolved:
    """A run of one virtual worker of so many images, which does not end."""
    changes: dict[str, Any] = {
        "gpus": 1,
        "per_gpu_batch": images,
        "epochs": 10**6,
        "steps": None,
        "last_batch": "drop",
    }
    changes |= {"together": 1, "progressive_size": (), "repeated_augment": 1}
    return replace(resolved, recipe=resolved.recipe.model_copy(update=changes))


def _trainer(
    resolved: Resolved,
    device: torch.device,
    threads: int,
    observer: SilentObserver,
    terms: int | None = None,
) -> Trainer:
    torch.set_num_threads(threads)
    world, recipe = Solo(), resolved.recipe
    images = shared(
        resolved.dataset, recipe.cache, recipe.loader, device.type, f"simulate {os.getpid()}", world.barrier
    )
    reading = loader_threads(recipe.loader_threads, threads, usable_cores(), reproducible=recipe.reproducible)
    trainer = Trainer(recipe, images, world, device=device, threads=reading, observer=observer, terms=terms)
    if trainer.noise_scale:
        trainer.noise_scale.every = 1  # a rehearsal has few steps
    return trainer


def _probe(trainer: Trainer, images: int) -> float:
    """Seconds of forward and backward for so many images of noise, without touching the run: the second of two."""
    model = copy.deepcopy(trainer.model)
    size = trainer.recipe.image_size
    noise = torch.randn(images, 3, size, size, device=trainer.device, dtype=trainer.forward.dtype)
    labels = torch.zeros(images, dtype=torch.int64, device=trainer.device)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with trainer.forward.autocast():
            loss = trainer.forward.loss(model(noise), labels)
        loss.backward()
        loss.item()
        seconds = time.perf_counter() - began
    return seconds
