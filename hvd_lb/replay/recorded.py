"""A run as its directory tells of it: recipe, records, chain, checkpoints; and where its loss jumped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Dataset, Progress, images_of
from hvd_lb.data.spec import absolute_spec
from hvd_lb.errors import UserError
from hvd_lb.exact.chain import ChainReport, examine_chain
from hvd_lb.plan.run_plan import RunPlan, Scale
from hvd_lb.recipe import Recipe, load_values, make_recipe
from hvd_lb.report.metrics import read_records
from hvd_lb.report.run_directory import RunDirectory, read_json
from hvd_lb.training.checkpoint import (
    Checkpoint,
    CheckpointStore,
    DamagedCheckpoint,
    open_checkpoint,
    read_state,
)
from hvd_lb.training.saved_state import SavedState

# Kinds of records that tell of steps done.
_OF_STEPS_DONE = ("train", "eval", "digest", "checkpoint")
_OF_SCALES = ("step", "epoch", "images", "workers")
# What no record of a kind is without, and what it is; a number that is not finite is null.
_NUMBER = (int, float, type(None))
_PARTS: dict[str, dict[str, Any]] = {
    "begin": {"recipe": dict, "data": str, "plan": dict},
    "train": {"lr": _NUMBER, "loss": _NUMBER},
    "eval": {"top1_error": _NUMBER},
    "digest": {"weights": str, "velocities": str},
    "environment": {"processes": int, "recipe": dict, "rounding": dict},
}


@dataclass(frozen=True)
class RecordedRun:
    """What is there of a run; nothing is written."""

    directory: RunDirectory
    recipe: Recipe
    records: list[dict[str, Any]]
    saved: Mapping[int, SavedState] = field(default_factory=dict)  #: what checkpoints tell, by steps done
    summary: dict[str, Any] | None = None  #: summary.json, where it is there; empty where it is damaged
    foreign: int = 0  #: lines of metrics.jsonl that are no whole records

    @property
    def path(self) -> Path:
        return self.directory.path

    @cached_property
    def chain(self) -> ChainReport:
        return examine_chain(self.records)

    @cached_property
    def steps(self) -> int:
        """Steps done, as far as is recorded."""
        done = [record["step"] + 1 for record in self.records if record.get("kind") in _OF_STEPS_DONE]
        return max(done, default=0)

    @property
    def first_step(self) -> int:
        """Steps done when it began: more than 0 where that was at another run's checkpoint."""
        return self.chain.begin["step"] + 1 if self.chain.begin else 0

    def plan(self, scales: tuple[Scale, ...]) -> RunPlan | None:
        """How many images each step has; None where the chain's beginning does not tell how many there are."""
        begin = self.chain.begin
        try:
            return self.recipe.run_plan(begin["plan"]["images"], scales=scales) if begin else None
        except (LookupError, TypeError, ValueError, UserError):
            return None

    @property
    def left_out(self) -> set[int]:
        """Steps that --on-nan rollback has left out."""
        rollbacks = (record for record in self.records if record.get("kind") == "rollback")
        return {record["step"] for record in rollbacks if record.get("left_out")}

    def scales(self, begun_at: Checkpoint | None) -> tuple[Scale, ...]:
        """From where on k was what: as a checkpoint knows of the steps before it, and as recorded of those after."""
        begin = begun_at.step if begun_at else 0
        known = [scale for scale in (begun_at.saved.scales if begun_at else ()) if scale.step < begin]
        told = (self.of_kind("rescale")[step] for step in sorted(self.of_kind("rescale")))
        known += [Scale(*(of[name] for name in _OF_SCALES)) for of in told if of["step"] >= begin]
        if not known or known[0].step:
            known.insert(0, Scale(0, 0, 0, self.recipe.gpus))
        return tuple(known)

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """By steps done, in this order."""
        found = reversed(CheckpointStore(self.directory.checkpoints).newest_first())
        return {int(path.name.removeprefix("step-")): path for path in found}

    @cached_property
    def processes(self) -> int | None:
        """On how many it was made last; None where that is not known."""
        return read_json(self.directory.environment).get("processes")

    def environments(self, start: int, end: int) -> list[dict[str, Any]] | None:
        """What rounding depended on in steps `start` to `end` − 1; None where it was not recorded of all of them."""
        known: list[tuple[int, dict[str, Any]]] = []
        for record in self.records:
            new = record.get("kind") == "environment"
            if new or (
                known and "to" in record
            ):  # who goes back takes the steps from there on again, as it is now
                first = record["step"] if new else min(record["to"], known[-1][0])
                known = [*(of for of in known if of[0] < first), (first, record if new else known[-1][1])]
        ends = [*(first for first, _ in known[1:]), math.inf]
        if not known or known[0][0] > start:
            return None
        return [of for (first, of), last in zip(known, ends, strict=True) if first < end and last > start]

    def of_kind(self, kind: str) -> dict[int, dict[str, Any]]:
        """Records by step."""
        return {record["step"]: record for record in self.records if record.get("kind") == kind}

    def start_before(self, step: int) -> tuple[Checkpoint | None, list[str]]:
        """The nearest intact checkpoint of at most `step` steps done, and what is wrong with those that are nearer.

        None: the start, which the seed gives. UserError where the run began at a checkpoint that is not here.
        """
        damaged: list[str] = []
        for done, path in reversed(self.checkpoints.items()):
            if done > step:
                continue
            try:
                return open_checkpoint(path), damaged
            except DamagedCheckpoint as error:
                damaged.append(str(error))
        if self.first_step:
            raise UserError(
                f"{self.path} began at step {self.first_step}, at another run's checkpoint, and has none of its own of "
                f"at most {step} steps: replay a later step, or that other run"
            )
        return None, damaged

    def open_data(self, data: str | None, val: str | None, on_progress: Progress | None = None) -> Dataset:
        """The data of the run, which may lie elsewhere now (`data`, `val`). UserError where they are other images."""
        recipe = self.recipe
        spec = absolute_spec(data) if data is not None else recipe.data or ""
        dataset = open_dataset(
            spec,
            val=absolute_spec(val) if val is not None else recipe.val,
            val_fraction=recipe.val_fraction,
            on_bad_image=recipe.on_bad_image,
            on_progress=on_progress,
        )
        known = self.chain.begin["data"] if self.chain.begin else None
        if known is not None and known != images_of(dataset.fingerprint()):
            raise UserError(
                f"{spec} is not what {self.path} was trained on (images, their bytes, labels or sizes differ): give "
                "that with --data"
            )
        return dataset


def open_run(path: Path) -> RecordedRun:
    """The run in a run directory. UserError where there is none, or what is there cannot be read as one.

    A run that goes on writes records before the checkpoint and summary that follow them; so these are read first.
    """
    directory = RunDirectory(path)
    if not directory.recipe.is_file():
        found = "holds no run" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}: expected a run directory with {directory.recipe.name}")
    recipe = make_recipe(load_values(str(directory.recipe)), str(directory.recipe))
    summary = _summary(directory.summary)
    saved: dict[int, SavedState] = {}
    for folder in CheckpointStore(directory.checkpoints).newest_first():
        with suppress(UserError, OSError):  # who opens it says what is wrong with it
            saved[int(folder.name.removeprefix("step-"))] = SavedState.from_json(read_state(folder))
    told, foreign = read_records(directory.metrics)
    records = [record for record in told if _is_whole(record)]
    foreign += len(told) - len(records)
    if foreign and not records:
        raise UserError(
            f"{directory.metrics} is damaged: expected a JSON record with kind and step on each line"
        )
    return RecordedRun(directory, recipe, records, saved, summary, foreign)


def _summary(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_whole(record: Mapping[str, Any]) -> bool:
    parts = _PARTS.get(str(record["kind"]) if "kind" in record else "", {})
    return all(name in record and isinstance(record[name], of) for name, of in parts.items())


@dataclass(frozen=True)
class Jump:
    """The steep rise of the training loss between two records: steps `first` to `last` are the later one's."""

    first: int
    last: int
    before: float
    after: float | None  #: None where it is no number


def worst_jump(run: RecordedRun) -> Jump:
    """Where the recorded loss rose most from one record to the next, a loss that is no number above all.

    UserError with fewer than two records, and where it never rose.
    """
    jumps = list(_jumps(run))
    worst = max(jumps, key=_rise, default=None)
    if worst is None or _rise(worst) <= 0:
        why = "its loss never rose from one record to the next" if jumps else "it has too few records"
        raise UserError(f"{run.path} has no spike of the training loss: {why}; name a step with --step")
    return worst


def _jumps(run: RecordedRun) -> Iterator[Jump]:
    trained = sorted(run.of_kind("train").items())
    for (before, old), (step, new) in zip(trained, trained[1:], strict=False):
        if old["loss"] is not None:
            yield Jump(before + 1, step, old["loss"], new["loss"])


def _rise(jump: Jump) -> float:
    return math.inf if jump.after is None else jump.after - jump.before
