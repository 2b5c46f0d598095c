"""What came of a sweep, counted as the paper counts (section 5.1): of each run the median validation error of its last
five epochs, of each setting mean and standard deviation over its seeds. That a run diverged is a result, too.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hvd_lb.launch.failure import read_errors
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import read_metrics
from hvd_lb.report.run_directory import read_json
from hvd_lb.report.summary import FINISHED, ended_after
from hvd_lb.schedule import scaled_learning_rate
from hvd_lb.sweep.plan import Point, Setting, Sweep, text_of
from hvd_lb.training.saved_state import counted_error

LAST_EPOCHS = 5
_DIGITS = 9  # after the point: what is behind them is the arithmetic of per cent


@dataclass(frozen=True)
class Result:
    """One setting. `errors` are those of its finished runs in per cent, `diverged` counts those whose loss or weights
    were no numbers any more, `planned` all.
    """

    setting: Setting
    minibatch: int
    learning_rate: float
    errors: list[float]
    diverged: int
    planned: int

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.errors) if self.errors else None

    @property
    def std(self) -> float | None:
        """Of the sample, with n − 1; none of a single run."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    def error(self) -> str:
        """23.74 ± 0.09"""
        if self.mean is None:
            return "diverged" if self.diverged else "–"
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")

    def runs(self) -> str:
        diverged = f", {self.diverged} diverged" if self.diverged else ""
        return f"{len(self.errors) + self.diverged} of {self.planned}{diverged}"


def error_of(point: Point, epochs: int = LAST_EPOCHS) -> float | None:
    """Median top-1 validation error of the last epochs of a finished run, in per cent; None before its end."""
    if not has_ended(point):
        return None
    last: dict[int, float] = {}
    for record in read_metrics(point.run.metrics):
        if record.get("kind") == "eval" and (error := counted_error(record)) is not None:
            last[record["epoch"]] = error
    newest = [last[epoch] for epoch in sorted(last)[-epochs:]]
    return statistics.median(newest) if newest else None


def has_ended(point: Point) -> bool:
    """Whether its run came to its end, or to --steps, which may be more by now, or none."""
    if read_json(point.run.summary).get("exit_reason") == FINISHED:
        return True
    return point.recipe.steps is not None and ended_after(point.run) >= point.recipe.steps


def has_diverged(point: Point) -> bool:
    """Whether its loss or weights were no numbers at its end, as they would be again."""
    return point.run.summary.exists() and any(
        error["kind"] == "Diverged" for error in read_errors(point.run.logs)
    )


def unfinished(points: Iterable[Point]) -> list[Point]:
    """Those that have neither come to their end nor diverged."""
    return [point for point in points if not (has_ended(point) or has_diverged(point))]


def error_in_words(point: Point, error: float) -> str:
    """As `error_of` counts by default."""
    return f"top-1 error {error:.2f} % ({_counted(LAST_EPOCHS, point.recipe).removeprefix('the ')})"


def _counted(epochs: int, recipe: Recipe) -> str:
    of = min(epochs, recipe.epochs)
    evaluated = "" if recipe.eval_every == "1epoch" else "evaluated "
    return f"the median of the last {of} {evaluated}epochs" if of > 1 else "that of the last epoch"


def results(sweep: Sweep, epochs: int = LAST_EPOCHS, only: Collection[str] | None = None) -> list[Result]:
    """One for each setting, in their order, and those that differ in `gpus` alone by their minibatch.

    With `only` those that have the recipe's values in all fields but these.
    """
    found = []
    for setting, planned in sweep.settings().items():
        if only is not None and not sweep.differs_in(setting) <= set(only):
            continue
        points = sweep.points_of(setting)
        errors = [error for point in points if (error := error_of(point, epochs)) is not None]
        recipe = points[0].recipe
        rate = scaled_learning_rate(
            recipe.learning_rate, recipe.global_batch, recipe.lr_rule, recipe.reference_batch
        )
        diverged = sum(map(has_diverged, points))
        found.append(Result(setting, recipe.global_batch, rate, errors, diverged, planned))
    lines: dict[tuple[Any, ...], list[Result]] = {}
    for result in found:
        others = tuple(sweep.value(result.setting, name) for name in sweep.fields() if name != "gpus")
        lines.setdefault(others, []).append(result)
    return [one for line in lines.values() for one in sorted(line, key=lambda result: result.minibatch)]


def within_noise(found: Sequence[Result], baseline: Result) -> Result | None:
    """The largest minibatch up to which, counted from the baseline's, no run diverged and every mean error is at most
    the baseline's mean and two of its standard deviations; None where the baseline has no deviation, or nothing was
    found.
    """
    if baseline.mean is None or baseline.std is None:
        return None
    best = None
    for result in sorted(found, key=lambda result: result.minibatch):
        if result.minibatch < baseline.minibatch:
            continue
        if result.diverged or result.mean is None or result.mean > baseline.mean + 2 * baseline.std:
            break
        best = result
    return best


def table(sweep: Sweep, found: Sequence[Result]) -> list[list[str]]:
    """Rows of texts, the first one of headings."""
    fields = _shown(sweep, found)
    heads = [
        *(name.replace("_", " ") for name in fields),
        "minibatch",
        "scaled learning rate",
        "top-1 error (%)",
        "runs",
    ]
    return [
        heads,
        *(
            [
                *(text_of(sweep.value(result.setting, name)) for name in fields),
                f"{result.minibatch:,}",
                f"{result.learning_rate:.4g}",
                result.error(),
                result.runs(),
            ]
            for result in found
        ),
    ]


def _shown(sweep: Sweep, found: Sequence[Result]) -> list[str]:
    """The fields that tell these results apart; all, where there is nothing to tell apart."""
    values = {
        name: {text_of(sweep.value(result.setting, name)) for result in found} for name in sweep.fields()
    }
    return [name for name, of in values.items() if len(of) > 1] or sweep.fields()


def whose_error(sweep: Sweep) -> str:
    """Words for the weights whose errors are counted; none where they are just those of the runs."""
    averaged = [bool(sweep.value(setting, "ema")) for setting in sweep.settings()]
    return (
        " of averaged weights" + ("" if all(averaged) else " where a run has them") if any(averaged) else ""
    )


def how(sweep: Sweep, epochs: int = LAST_EPOCHS) -> str:
    """How the errors are counted, in a sentence."""
    which = _counted(epochs, sweep.base)
    return (
        f"Top-1 validation error{whose_error(sweep)} in per cent: of each run {which}, mean ± standard deviation over "
        "the seeds that did not diverge."
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def as_csv(sweep: Sweep, found: Sequence[Result]) -> str:
    """With all digits that mean something, for programs."""
    fields, text = sweep.fields(), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = (
        "minibatch",
        "scaled_learning_rate",
        "runs",
        "diverged",
        "planned",
        "mean_error",
        "std_error",
        "errors",
    )
    writer.writerow([*fields, *more])
    for result in found:
        values: list[Any] = [text_of(sweep.value(result.setting, name)) for name in fields]
        values += [
            result.minibatch,
            result.learning_rate,
            len(result.errors),
            result.diverged,
            result.planned,
        ]
        figures = [
            "" if figure is None else str(round(figure, _DIGITS)) for figure in (result.mean, result.std)
        ]
        values += [*figures, " ".join(str(round(error, _DIGITS)) for error in result.errors)]
        writer.writerow(values)
    return text.getvalue()
