"""Which images each step of a whole run is made of, also where the number of virtual workers changes within it.

A run is a list of *scales*: from which step on, at which position (epoch, images of it used so far), it has how many
virtual workers. Position and list are all it takes: the next step begins where the last one ended, so no image of an
epoch's permutation comes twice or is left out by a change. A run whose k stays has one scale.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hvd_lb.plan.samples import SamplePlan

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Scale:
    """From step `step` of the run on, where `images` images of `epoch` are used, it has so many virtual workers."""

    step: int
    epoch: int
    images: int
    workers: int


@dataclass(frozen=True)
class PlannedStep:
    """A step of a run: number `step` of a plan that is an epoch's, or of what of it was left at a change."""

    epoch: int
    step: int
    plan: SamplePlan

    @property
    def begins(self) -> int:
        """Images of the epoch that are used before it."""
        return self.plan.begin + self.step * self.plan.global_batch

    @property
    def images(self) -> int:
        """B, the normaliser of its gradient."""
        return self.plan.step_images(self.step)

    def with_images(self, workers: Iterable[int] | None = None) -> list[int]:
        """Which of these virtual workers, by default of all, have images in this step."""
        among = range(self.plan.workers) if workers is None else workers
        return [worker for worker in among if len(self.plan.positions(self.step, worker))]

    def image_ids(self, worker: int) -> np.ndarray:
        """As `SamplePlan.image_ids`."""
        return self.plan.image_ids(self.epoch, self.step, worker)

    def draws(self, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """As `SamplePlan.draws`."""
        return self.plan.draws(self.epoch, self.step, worker)


@dataclass(frozen=True)
class Part:
    """The steps of a run from a scale on: those of `rest`, which end its epoch, then whole epochs of `plan`.

    They go on after the next scale, too, as if it were not there.
    """

    scale: Scale
    plan: SamplePlan
    rest: SamplePlan

    @property
    def offset(self) -> int:
        """Where epoch 0 would have begun: step s is of epoch (s − offset) // steps per epoch, and is the first of it
        where nothing is left over."""
        ends = self.scale.step + self.rest.steps_per_epoch
        return ends - (self.scale.epoch + 1) * self.plan.steps_per_epoch

    def at(self, step: int) -> PlannedStep:
        within = step - self.scale.step
        if within < self.rest.steps_per_epoch:
            return PlannedStep(self.scale.epoch, within, self.rest)
        return PlannedStep(*divmod(step - self.offset, self.plan.steps_per_epoch), self.plan)

    def virtual_step(self, step: int) -> float:
        """Its number in a run that has had this k from its beginning: the same position, perhaps within a step."""
        planned = self.at(step)
        before = planned.epoch * self.plan.steps_per_epoch + planned.step
        return before + planned.plan.begin / self.plan.global_batch if planned.plan.begin else before


class RunPlan:
    """All steps of a run of `epochs` epochs. `plan` is that of its first k, or of any; `scales` are in their order."""

    def __init__(self, plan: SamplePlan, epochs: int, scales: Sequence[Scale] = ()):
        self.epochs = epochs
        self.scales = tuple(scales) or (Scale(0, 0, 0, plan.workers),)
        self.parts = [_part(plan, scale) for scale in self.scales]
        self._firsts = [scale.step for scale in self.scales]

    @property
    def plan(self) -> SamplePlan:
        """Of the whole epochs from the last scale on."""
        return self.parts[-1].plan

    @property
    def offset(self) -> int:
        """`Part.offset` from the last scale on; 0 in a run whose k has not changed."""
        return self.parts[-1].offset

    @property
    def end(self) -> int:
        """The number of steps of the run, if k stays from here on."""
        return self.offset + self.epochs * self.plan.steps_per_epoch

    def number(self, step: int) -> int:
        """Of the scale that a step is of."""
        return max(0, bisect_right(self._firsts, step) - 1)

    def at(self, step: int) -> PlannedStep:
        return self.parts[self.number(step)].at(step)

    def rescaled(self, step: int, workers: int) -> tuple[Scale, ...]:
        """The scales of the run when it has so many virtual workers after `step` steps; nothing later was taken."""
        before = RunPlan(self.plan, self.epochs, [scale for scale in self.scales if scale.step < step])
        if step == 0:
            return (Scale(0, 0, 0, workers),)
        if before.plan.workers == workers:
            return before.scales
        planned = before.at(step)
        return (*before.scales, Scale(step, planned.epoch, planned.begins, workers))


def _part(plan: SamplePlan, scale: Scale) -> Part:
    whole = replace(plan, workers=scale.workers, begin=0)
    return Part(scale, whole, replace(whole, begin=scale.images) if scale.images else whole)
