"""The learning rate as a pure function of the step (paper section 2.1 and 2.2, docs/design.md 4).

linear scaling   peak = reference · kn / 256, or of another minibatch that the reference is for
gradual warmup   reference + (peak − reference) · t / T_w, the same increment at every iteration t < T_w
afterwards       step decay (÷ 10 at 30, 60, 80 of 90 epochs), cosine or polynomial
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from hvd_lb.errors import UserError, one_of

REFERENCE_BATCH = 256
REFERENCE_EPOCHS = 90
_RAMP = 10  # momentum m remembers 1/(1 − m) steps

Rule = Literal["linear", "sqrt", "none"]
Shape = Literal["step", "cosine", "polynomial"]
Warmup = Literal["gradual", "constant", "none"]


def scaled_learning_rate(
    learning_rate: float, global_batch: int, rule: Rule = "linear", reference_batch: int = REFERENCE_BATCH
) -> float:
    """The rate of a minibatch of `global_batch` images, from that of `reference_batch` (paper equation 3, Table 2).

    The `rule` "linear" takes it times their ratio, "sqrt" times the root of that, "none" leaves it as it is.
    `UserError`, a `ValueError`, for another rule and for numbers of images that are not above 0.
    """
    one_of("rule", rule, get_args(Rule))
    _check_positive("global_batch", global_batch)
    _check_positive("reference_batch", reference_batch)
    ratio = global_batch / reference_batch
    return learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


def _is_finite(number: Any) -> bool:
    return isinstance(number, Real) and math.isfinite(number)


def _check_positive(name: str, number: Any) -> None:
    if not (_is_finite(number) and number > 0):
        raise UserError(f"{name} {number!r}: expected a finite number above 0")


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step; `Schedule(...)(step)`, steps counted from 0 over the whole run.

    learning_rate: the reference, for `reference_batch` images.
    global_batch: images of a step on all processes, kn.
    steps_per_epoch, epochs: of the whole run, warmup included.
    rule: how the reference is scaled to the peak, as `scaled_learning_rate` does: "linear", "sqrt" or "none".
    shape: what comes after warmup. "step" multiplies the rate by `drop_factor` at each of `drop_epochs`, which are
        epochs of a run of 90, scaled to `epochs`; "cosine" falls to 0 at the end along half a cosine; "polynomial" is
        peak · (1 − progress)^`power`.
    warmup: over `warmup_epochs`, a fraction of epochs too: "gradual" rises from the reference to the peak by the same
        increment at every step, "constant" stays at the reference (paper section 2.2). It takes place only where the
        peak is above the reference (kn > 256, section 5.1). With "none" the first step is at the peak.

    `UserError`, a `ValueError`, for what is no schedule.
    """

    learning_rate: float
    global_batch: int
    steps_per_epoch: int
    epochs: int
    rule: Rule = "linear"
    shape: Shape = "step"
    warmup: Warmup = "gradual"
    warmup_epochs: float = 5
    drop_epochs: tuple[float, ...] = (30, 60, 80)
    drop_factor: float = 0.1
    power: float = 2.0
    reference_batch: int = REFERENCE_BATCH

    def __post_init__(self) -> None:
        """UserError for what is no schedule; a recipe's fields were looked at before."""
        for name, kind in (("rule", Rule), ("shape", Shape), ("warmup", Warmup)):
            one_of(name, getattr(self, name), get_args(kind))
        for name in ("learning_rate", "drop_factor", "power"):
            _check_positive(name, getattr(self, name))
        for name in ("global_batch", "steps_per_epoch", "epochs", "reference_batch"):
            _check_positive(name, getattr(self, name))
        if not (_is_finite(self.warmup_epochs) and self.warmup_epochs >= 0):
            raise UserError(f"warmup_epochs {self.warmup_epochs!r}: expected a finite number, 0 or more")
        drops: Any = self.drop_epochs
        if (
            not isinstance(drops, Sequence)
            or not all(_is_finite(epoch) and 0 <= epoch <= REFERENCE_EPOCHS for epoch in drops)
            or list(drops) != sorted(drops)
        ):
            raise UserError(f"drop_epochs {drops}: expected increasing epochs of a run of {REFERENCE_EPOCHS}")
        if self.warmup_steps and self.warmup_steps >= self.total_steps:
            raise UserError(
                f"the warmup is no shorter than the run: give warmup_epochs less than {self.epochs}, or epochs more "
                f"than {self.warmup_epochs:g}"
            )

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def peak(self) -> float:
        """The scaled learning rate, reached when warmup ends."""
        return scaled_learning_rate(self.learning_rate, self.global_batch, self.rule, self.reference_batch)

    @property
    def warmup_steps(self) -> int:
        if self.warmup == "none" or self.peak <= self.learning_rate:
            return 0
        return round(self.warmup_epochs * self.steps_per_epoch)

    def __call__(self, step: float) -> float:
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        if step < self.warmup_steps:
            if self.warmup == "constant":
                return self.learning_rate
            return self.learning_rate + (self.peak - self.learning_rate) * (step / self.warmup_steps)
        if self.shape == "step":
            return self.peak * self.drop_factor ** sum(step >= drop for drop in self.drop_steps)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        rest = 1.0 - min(progress, 1.0)
        if self.shape == "cosine":
            return self.peak * 0.5 * (1.0 - math.cos(math.pi * rest))
        return self.peak * rest**self.power

    @property
    def drop_steps(self) -> tuple[int, ...]:
        """First steps at each lower learning rate of the step decay."""
        scale = self.total_steps / REFERENCE_EPOCHS
        # Rounded up, but not for what is only float noise above a whole number.
        return tuple(math.ceil(epoch * scale - 1e-6) for epoch in self.drop_epochs)

    def describe(self) -> str:
        """How the learning rate was derived, in one line for a person."""
        formula = {
            "linear": f"{self.learning_rate:g} × {self.global_batch}/{self.reference_batch} = {self.peak:.6g}",
            "sqrt": f"{self.learning_rate:g} × √({self.global_batch}/{self.reference_batch}) = {self.peak:.6g}",
            "none": f"{self.peak:.6g}, not scaled",
        }[self.rule]
        if self.warmup_steps:
            start = "gradual warmup from" if self.warmup == "gradual" else "constant warmup at"
            warmup = f"{start} {self.learning_rate:g} over {self.warmup_epochs:g} epochs ({self.warmup_steps} steps)"
        elif self.warmup == "none":
            warmup = "no warmup"
        else:
            warmup = f"no warmup, as it is not above the reference {self.learning_rate:g}"
        return f"{formula}; {warmup}; {self._describe_decay()}"

    def _describe_decay(self) -> str:
        if self.shape == "cosine":
            return f"then cosine to 0 at epoch {self.epochs}"
        if self.shape == "polynomial":
            return f"then polynomial of power {self.power:g} to 0 at epoch {self.epochs}"
        epochs = ", ".join(f"{step / self.steps_per_epoch:.4g}" for step in self.drop_steps)
        return f"then × {self.drop_factor:g} at epochs {epochs} of {self.epochs}"


class RescaledSchedule:
    """The rate of each step of a run whose minibatch changes within it (`hvd_lb.plan.run_plan`).

    Each minibatch has the schedule of a run that has had it from its beginning, at the same position: the scaled rate
    follows it, and warmup and drops come after the same images. Where the rate would rise by a change it does so
    gradually: a share of it, at first that which leaves it as it was, grows to 1 by the same increment at every step.
    Where it falls, it falls at once, as the smaller minibatch needs it.
    """

    def __init__(self, changes: Sequence[Change]):
        self._changes = list(changes)
        self._shares = [1.0]  # of its own schedule, with which each begins
        self.warmup_steps = self._changes[-1].schedule.warmup_steps
        for number, change in enumerate(self._changes[1:], start=1):
            before, after = self._rate(number - 1, change.step), change.rate(change.step)
            self._shares.append(min(1.0, before / after) if after else 1.0)

    def __call__(self, step: int) -> float:
        return self._rate(self._number(step), step)

    def full(self, step: int) -> float:
        """The rate that it rises to."""
        return self._changes[self._number(step)].rate(step)

    def _number(self, step: int) -> int:
        return sum(change.step <= step for change in self._changes[1:])

    def _rate(self, number: int, step: int) -> float:
        """With the `number`-th minibatch, also after the next has come."""
        change, share = self._changes[number], self._shares[number]
        done = step - change.step
        if done < change.ramp_steps:
            share += (1.0 - share) * (done / change.ramp_steps)
        else:
            share = 1.0
        return share * change.rate(step)


@dataclass(frozen=True)
class Change:
    """From `step` on the schedule is this one, at `virtual_step(step)` of it."""

    step: int
    schedule: Schedule
    virtual_step: Callable[[int], float]
    ramp_steps: int

    def rate(self, step: int) -> float:
        return self.schedule(self.virtual_step(step))


def ramp_steps(momentum: float, steps_per_epoch: int) -> int:
    """Over how many steps the rate rises: ten times as many as the momentum remembers, an epoch at most."""
    return min(steps_per_epoch, round(_RAMP / (1.0 - momentum)))
