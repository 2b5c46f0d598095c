"""Two runs side by side: their recipes, their metrics, and the tensors of a checkpoint that both have.

"The same steps on other hardware" is a claim about bits, so bits are compared, and a NaN equals a NaN of the same
bits. What may differ without touching the mathematics (free fields of the recipe, the environment) is told, but is no
difference. Reads only; one tensor of each run is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.exact.digest import PARTS
from hvd_lb.recipe import FREE_FIELDS, Recipe, differing_fields, load_values, make_recipe
from hvd_lb.report.compare_tensors import CheckpointComparison, compare_checkpoints
from hvd_lb.report.metrics import read_records
from hvd_lb.report.run_directory import RunDirectory, read_json
from hvd_lb.report.text import count
from hvd_lb.training.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from hvd_lb.training.pointers import followed

KINDS = ("train", "eval", "digest")
_NO_RESULT = {"kind", "epoch", "step", "images_per_second", "data_wait"}
_ABSENT = "absent"
# How a run was typed says nothing about where it ran.
_NO_PLACE = {"command", "executable"}


@dataclass(frozen=True)
class MetricDifference:
    """One field: in how many records it differs, the first of them, and the largest absolute difference.

    Differences are NaN where one of the values is no number.
    """

    field: str
    records: int
    step: int
    a: Any
    b: Any
    difference: float
    largest: float


@dataclass(frozen=True)
class MetricsComparison:
    """The records of one kind: how many each run has, and how many of each field were compared."""

    kind: str
    records: tuple[int, int]
    compared: int
    fields: Mapping[str, int]
    differing: list[MetricDifference]


@dataclass(frozen=True)
class Comparison:
    """Everything told about two runs. Recipe and environment as "name: a → b"; `notes` say what was not compared."""

    mathematics: list[str]
    free: list[str]
    environment: list[str]
    metrics: list[MetricsComparison]
    checkpoint: CheckpointComparison | None
    notes: list[str]

    @property
    def identical(self) -> bool:
        """Same mathematics, same compared metrics, and all tensors of a checkpoint bitwise the same."""
        metrics = any(comparison.differing for comparison in self.metrics)
        return not (self.mathematics or metrics or self.checkpoint is None or self.checkpoint.differing)


@dataclass(frozen=True)
class _Side:
    """One of the two: a run directory, or a checkpoint alone (`run` is None). Checkpoints by steps done."""

    path: Path
    run: RunDirectory | None
    checkpoints: dict[int, Path]


def compare_runs(a: Path, b: Path, step: int | None = None) -> Comparison:
    """Compare two run directories, or the tensors alone where one of the two is a single checkpoint.

    The checkpoints are those of `step` steps, else the newest that both have intact; `Comparison.checkpoint` is None
    where two runs have no step in common. Two single checkpoints may be of different steps. UserError when something
    is missing, damaged or no run.
    """
    sides = _side(a), _side(b)
    mathematics, free, environment, metrics, notes = [], [], [], [], []
    runs = [side.run for side in sides if side.run]
    if len(runs) == 2:
        recipes = [_recipe(run) for run in runs]
        mathematics = differing_fields(*(recipe.mathematics() for recipe in recipes))
        free = differing_fields(*(recipe.model_dump(mode="json", include=FREE_FIELDS) for recipe in recipes))
        environments = [_environment(run) for run in runs]
        if all(environments):
            environment = differing_fields(*environments)
        else:
            notes.append("environment.json is absent or damaged: the environments were not compared")
        records = [_records(run, notes) for run in runs]
        metrics = [
            _compare_metrics(kind, *(found[kind] for found in records))
            for kind in KINDS
            if kind != "digest" or any(found[kind] for found in records)
        ]
    checkpoints = _choose(*sides, step, notes)
    compared = compare_checkpoints(*checkpoints) if checkpoints else None
    return Comparison(mathematics, free, environment, metrics, compared, notes)


def _side(path: Path) -> _Side:
    if path.is_file():
        path = followed(path)
    if (path / "state.json").is_file():
        return _Side(path, None, {open_checkpoint(path).step: path})
    run = RunDirectory(path)
    if not run.recipe.is_file():
        found = "is neither a run nor a checkpoint" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}: expected a folder with recipe.yaml or state.json")
    steps = {
        found.name.removeprefix("step-"): found for found in CheckpointStore(run.checkpoints).newest_first()
    }
    return _Side(path, run, {int(step): found for step, found in steps.items() if step.isdecimal()})


def _recipe(run: RunDirectory) -> Recipe:
    return make_recipe(load_values(str(run.recipe)), str(run.recipe))


def _environment(run: RunDirectory) -> dict[str, Any]:
    """environment.json as names and short texts; empty when it cannot be read, as it is information only."""
    content = read_json(run.environment)
    values = {**content, **(content.get("versions") or {}), **(content.get("variables") or {})}
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in values.items()
        if name not in _NO_PLACE and not isinstance(value, dict)
    }


def _records(run: RunDirectory, notes: list[str]) -> dict[str, dict[int, dict[str, Any]]]:
    """The records of each kind by step."""
    records, foreign = read_records(run.metrics)
    if foreign and not records:
        raise UserError(f"{run.metrics} is damaged: expected a JSON record with kind and step per line")
    if foreign:
        notes.append(f"{run.metrics}: {count(foreign, 'line')} left out, as no whole record")
    return {kind: {r["step"]: r for r in records if r.get("kind") == kind} for kind in KINDS}


def _compare_metrics(
    kind: str, a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]
) -> MetricsComparison:
    before_a, before_b = _steps_before(a), _steps_before(b)
    common = sorted(a.keys() & b.keys())
    fields: dict[str, int] = {}
    found: dict[str, list[tuple[int, Any, Any, float]]] = {}
    for step in common:
        for field in _fields(kind, a[step], b[step]):
            # A training loss is the mean since the record before: comparable over the same steps only.
            comparable = (kind, field) != ("train", "loss") or before_a[step] == before_b[step]
            fields[field] = fields.get(field, 0) + comparable
            if not comparable:
                continue
            x, y = a[step].get(field, _ABSENT), b[step].get(field, _ABSENT)
            if not _same(x, y):
                found.setdefault(field, []).append((step, x, y, _distance(x, y)))
    differing = [
        MetricDifference(field, len(cases), *cases[0], max((case[3] for case in cases), key=_badness))
        for field, cases in found.items()
    ]
    return MetricsComparison(kind, (len(a), len(b)), len(common), fields, differing)


def _fields(kind: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Sequence[str]:
    """What of two records of a step is compared."""
    if kind == "digest":  # in float mode there is none of statistics; a link is of everything before
        return [part for part in PARTS if part in a and part in b]
    return sorted({*a, *b} - _NO_RESULT) if kind == "eval" else ("lr", "loss")


def _steps_before(records: Mapping[int, Any]) -> dict[int, int | None]:
    steps = sorted(records)
    return dict(zip(steps, [None, *steps], strict=False))


def _same(x: Any, y: Any) -> bool:
    return x == y or (isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y))


def _distance(x: Any, y: Any) -> float:
    numbers = isinstance(x, int | float) and isinstance(y, int | float)
    return abs(x - y) if numbers else math.nan


def _badness(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _choose(a: _Side, b: _Side, step: int | None, notes: list[str]) -> tuple[Checkpoint, Checkpoint] | None:
    """The two checkpoints to compare; None when two runs have none in common, which `notes` then say."""
    if step is None and not (a.run or b.run):
        return open_checkpoint(a.path), open_checkpoint(b.path)
    for side in (a, b):
        if step is not None and step not in side.checkpoints:
            raise UserError(f"{side.path} has no checkpoint of step {step}: it has {_steps(side)}")
    common = a.checkpoints.keys() & b.checkpoints.keys() if step is None else {step}
    if not common:
        message = f"no checkpoint in common: {a.path} has {_steps(a)}, {b.path} has {_steps(b)}"
        if not (a.run and b.run):
            raise UserError(message)
        notes.append(message)
        return None
    problems: list[str] = []
    for candidate in sorted(common, reverse=True):
        try:
            chosen = open_checkpoint(a.checkpoints[candidate]), open_checkpoint(b.checkpoints[candidate])
        except UserError as error:
            problems.append(str(error))
        else:
            notes += problems
            return chosen
    raise UserError(problems[0])


def _steps(side: _Side) -> str:
    return f"step {', '.join(map(str, sorted(side.checkpoints)))}" if side.checkpoints else "none"
