"""The very steps of a run, taken again on this one process and held against what the run recorded.

They are the trainer's own, from a checkpoint or from the seed. In the reproducible mode, on the same libraries and the
same kind of device, each recorded number and digest comes again to the bit. In float mode the bits depend on the number
of processes; there losses are compared, and rounding alone may make them differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_lb.data.images import Dataset
from hvd_lb.errors import UserError
from hvd_lb.exact.digest import PARTS, state_digests
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.exact.reproducible import rounding_environment
from hvd_lb.exact.rounding import rounding_differences
from hvd_lb.machine.cpu import usable_cores
from hvd_lb.machine.placement import loader_threads
from hvd_lb.recipe import FLOAT_FIELDS, differing_fields
from hvd_lb.replay.recorded import RecordedRun
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.report.text import count
from hvd_lb.training.checkpoint import Checkpoint
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

#: Relative differences of losses up to here are put down to rounding, where that may differ.
ROUNDING = 1e-3
#: Losses that are further apart soon after a checkpoint are no rounding; in a long stretch it may grow to that.
FAR = 0.05
# What is compared of an evaluation.
_OF_EVALUATIONS = (
    *("top1_error", "top5_error", "loss", "images"),
    *("ema_top1_error", "ema_top5_error", "ema_loss"),
)


@dataclass(frozen=True)
class Difference:
    """The first thing that is not as it was recorded, after step `step`: a number, or the digest of a part."""

    step: int
    what: str
    recorded: Any
    found: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.what} recorded {_short(self.recorded)}, found {_short(self.found)}"


def _short(value: Any) -> str:
    return f"{value[:16]}…" if isinstance(value, str) and len(value) > 16 else str(value)


@dataclass
class Compared:
    """What was compared, and how it came out. Differences of losses are relative; of digests bits."""

    records: int = 0  #: of training and evaluations
    digests: int = 0
    same_digests: int = 0
    largest: float = 0.0  #: difference of a loss
    first: Difference | None = None
    far: Difference | None = None  #: the first loss that is `FAR` from what was recorded

    def number(self, step: int, what: str, recorded: Any, found: Any) -> None:
        """A number of a record; null and not-a-number are the same."""
        found = None if isinstance(found, float) and not math.isfinite(found) else found
        if recorded == found:
            return
        apart = math.inf
        if recorded is not None and found is not None:
            apart = abs(recorded - found) / max(abs(recorded), abs(found))
        self.largest = max(self.largest, apart)
        different = Difference(step, what, recorded, found)
        self.first = self.first or different
        if apart > FAR and what.endswith("loss"):  # of few images one may be on the other side by rounding
            self.far = self.far or different

    def digest(self, step: int, recorded: Mapping[str, Any], found: Mapping[str, str]) -> None:
        differing = [part for part in PARTS if part in found and recorded.get(part) != found[part]]
        self.digests += 1
        self.same_digests += not differing
        for part in differing[:1]:
            self.first = self.first or Difference(step, f"digest of {part}", recorded.get(part), found[part])

    @property
    def to_rounding(self) -> bool:
        """Whether all losses are as recorded but for what rounding may do."""
        return self.largest <= ROUNDING

    def add(self, other: Compared) -> None:
        self.records += other.records
        self.digests += other.digests
        self.same_digests += other.same_digests
        self.largest = max(self.largest, other.largest)
        self.first = self.first or other.first
        self.far = self.far or other.far


@dataclass(frozen=True)
class Expectation:
    """Whether the same bits can be expected here; `why` says why not, in words. `half`: not even sums of fp32."""

    bits: bool
    why: str = ""
    half: bool = False


def expectation(run: RecordedRun, checkpoint: Checkpoint | None, device: str, end: int) -> Expectation:
    """Of steps of `run` up to `end` taken again on this machine's `device`, from `checkpoint` or the start."""
    if run.recipe.compress != "none" and run.processes != 1:
        return Expectation(
            False,
            f"its processes exchanged gradients in {run.recipe.compress}, and one process exchanges, and rounds, none",
            half=True,
        )
    recipe, here = run.recipe, rounding_environment(device)
    made = run.environments(checkpoint.step if checkpoint else 0, end)
    known = [of["rounding"] for of in made] if made is not None else _kept(run, checkpoint, end)
    if known is None:
        return Expectation(False, "with which software and hardware all of it was made was not recorded")
    if changes := [change for of in known for change in rounding_differences(of, here)]:
        changed = "; ".join(dict.fromkeys(changes))
        return Expectation(False, f"it was made with other software or hardware than is here ({changed})")
    if recipe.reproducible:
        return Expectation(True)
    processes = max((of["processes"] for of in made), default=1) if made is not None else run.processes
    if processes != 1:
        where = "another number of" if processes is None else f"{processes}"
        return Expectation(
            False, f"it is a run in float mode on {where} processes: on one its sums round otherwise"
        )
    fields = recipe.model_dump(mode="json", include=FLOAT_FIELDS)
    if changes := [change for of in made or () for change in differing_fields(of["recipe"], fields)]:
        return Expectation(False, f"it is a run in float mode that went on otherwise ({'; '.join(changes)})")
    if recipe.gpus > 1 and recipe.together == "auto":
        return Expectation(
            False,
            "it is a run in float mode that chose by speed how many virtual workers it computes together",
        )
    if recipe.threads is None:
        return Expectation(False, "it is a run in float mode whose number of threads depends on the machine")
    return Expectation(True)


def _kept(run: RecordedRun, checkpoint: Checkpoint | None, end: int) -> list[dict[str, Any]] | None:
    """Of an older version's run: what the checkpoints at both ends of the steps tell; None where there are none."""
    after = next((saved for step, saved in sorted(run.saved.items()) if step >= end), None)
    if after is None:
        return None
    return [*([checkpoint.saved.environment] if checkpoint else ()), after.environment]


@dataclass
class Again(SilentObserver):
    """A trainer that takes steps of `run` again on one process, and what came of the comparison.

    `on_microbatch(step, done, of)` hears of progress. With `evaluations` those that are recorded are made again, too.
    """

    run: RecordedRun
    dataset: Dataset
    device: torch.device
    begun_at: Checkpoint | None
    evaluations: bool = False
    on_microbatch: Callable[[int, int, int], None] = lambda step, done, of: None
    compared: Compared = field(default_factory=Compared)

    def __post_init__(self) -> None:
        recipe, train = self.run.recipe, self.dataset.train
        self._threads = recipe.threads or usable_cores()
        torch.set_num_threads(self._threads)
        self._reading = loader_threads(
            recipe.loader_threads, self._threads, usable_cores(), reproducible=recipe.reproducible
        )
        #: Of all steps of the run, those after further changes of k included.
        self.run_plan = recipe.run_plan(len(train), train.labels, self.run.scales(self.begun_at))
        #: Called with each trainer: there is another one after each change of k, as in the run.
        self.on_trainer: Callable[[Trainer], None] = lambda trainer: None
        begin = self.begun_at.step if self.begun_at else 0
        self.trainer = self._trainer(begin, checkpoint=self.begun_at)
        self._trained, self._evaluated, self._digested = map(self.run.of_kind, ("train", "eval", "digest"))

    def _trainer(self, step: int, **state: Any) -> Trainer:
        trainer = Trainer(
            self.run.recipe,
            self.dataset,
            Solo(),
            device=self.device,
            threads=self._reading,
            observer=self,
            scales=[scale for scale in self.run_plan.scales if scale.step <= step],
            **state,
        )
        trainer.model.train()
        trainer.state.left_out |= self.run.left_out
        return trainer

    @property
    def step(self) -> int:
        """Steps done."""
        return self.trainer.step

    def take(
        self,
        until: int,
        before: Callable[[int], None] = lambda step: None,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Steps until so many are done; `before` and `after` are called with the number of each.

        `before` once more for a step that is taken again, as its numbers overflowed. UserError where the recipe has
        fewer steps.
        """
        end = min(self.run_plan.end, self.run.recipe.steps or self.run_plan.end)
        if until > end:
            recorded = f"{self.run.path} has a record of step {until - 1}"
            raise UserError(f"{recorded}, and its recipe has {count(end, 'step')}")
        torch.set_num_threads(self._threads)  # of this process, in which there may be another run
        while self.step < until:
            if self.step in self._changes and self.trainer.run_plan.scales[-1].step < self.step:
                self.trainer = self._trainer(self.step, carried=self.trainer.hand_over())
                self.on_trainer(self.trainer)
            trainer = self.trainer
            stop = min([until, *(step for step in self._changes if step > self.step)])
            try:
                with trainer.kernels(), trainer.batches() as batches:
                    while trainer.step < stop:
                        before(trainer.step)
                        trainer.train_step(batches)
                        self._compare(trainer.step - 1)
                        after(trainer.step - 1)
            except FixedPointOverflow:
                pass  # as in the run

    @property
    def _changes(self) -> list[int]:
        return [scale.step for scale in self.run_plan.scales]

    def learnt(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of what has been learnt up to now: the model's tensors and the optimizer's."""
        if self.run.recipe.reproducible:
            self.trainer.state.statistics.publish()
        return self.trainer.state.learnt(statistics=self.run.recipe.reproducible)

    def digests(self) -> dict[str, str]:
        """Of these."""
        return state_digests(*self.learnt())

    def _compare(self, step: int) -> None:
        if (told := self._trained.get(step)) and self.trainer.state.loss_images:
            self.compared.records += 1
            self.compared.number(step, "loss", told["loss"], self.trainer.state.take_loss())
            self.compared.number(step, "learning rate", told["lr"], self.trainer.schedule(step))
        # Statistics that were taken anew before an evaluation are part of the state, also where a stop came before it.
        recompute = bool(self.run.recipe.recompute_bn)
        last = step + 1 == self.run.steps and self.trainer.due(self.run.recipe.eval_every)
        evaluate = (self.evaluations or recompute) if step in self._evaluated else recompute and last
        self.trainer.after_step(evaluate, False, step in self._digested)

    # What the trainer tells

    def microbatch(self, step: int, done: int, of: int) -> None:
        self.on_microbatch(step, done, of)

    def evaluation(self, record: dict[str, Any]) -> None:
        if (told := self._evaluated.get(record["step"])) is None:
            return
        self.compared.records += 1
        for name in _OF_EVALUATIONS:
            self.compared.number(
                record["step"], f"evaluation's {name.replace('_', ' ')}", told.get(name), record.get(name)
            )

    def digest(
        self, record: dict[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        step = record["step"]
        self.compared.digest(step, self._digested[step], state_digests(model, optimizer))
