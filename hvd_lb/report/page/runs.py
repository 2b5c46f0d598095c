"""The page of one run, or of several over each other: figures, curves, events, and in what they differ.

It is RUN/report.html at a run's end, and what `hvd-lb report` writes.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.recipe_file import parse_values, read_text
from hvd_lb.report.metrics import Epochs, read_metrics
from hvd_lb.report.page.chart import Chart, Mark, Series
from hvd_lb.report.page.events import Event, events
from hvd_lb.report.page.page import folded, page, rows, table
from hvd_lb.report.run_directory import RunDirectory, read_json, replace_text
from hvd_lb.report.text import duration, figure, printable, speed
from hvd_lb.training.saved_state import counted_error

# Evaluations in the table of a page; all are in the curves.
_MOST_LINES = 200
# More are shown when they are asked for.
_FEW_LINES = 20


def recipe_of(directory: RunDirectory) -> dict[str, Any] | None:
    """The fields of a run's recipe; None where they cannot be read."""
    try:
        return parse_values(read_text(directory.recipe), str(directory.recipe))
    except UserError:
        return None


@dataclass(frozen=True)
class _Run:
    """What a run directory tells, read once; `name` is as short as the others allow."""

    directory: RunDirectory
    name: str
    number: int

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.directory.metrics)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return read_json(self.directory.summary)

    @cached_property
    def events(self) -> list[Event]:
        return events(self.directory, self.records)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return recipe_of(self.directory) or {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        return read_json(self.directory.environment)

    @cached_property
    def after(self) -> Epochs:
        """How many epochs so many steps are."""
        return Epochs(self.records, self._steps_per_epoch)

    @cached_property
    def _steps_per_epoch(self) -> float:
        """At its beginning: as the run says, else by records: step s of epoch e says that s / (e + 1) < it ≤ s / e."""
        if known := read_json(self.directory.launching).get("steps_per_epoch"):
            return float(known)
        steps, epochs = self.summary.get("steps"), self.summary.get("epochs")
        if steps and epochs:
            return float(steps / epochs)
        told = [
            (record["step"], record["epoch"]) for record in self.records if record.get("epoch") is not None
        ]
        upper = [step // epoch for step, epoch in told if epoch]
        lower = [step // (epoch + 1) + 1 for step, epoch in told]
        return float(min(upper) if upper else max(lower, default=1))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind") == kind]

    def curve(
        self, kind: str, field: str, name: str = "", *, scale: float = 1, dashed: bool = False
    ) -> Series:
        of_kind = [record for record in self.of(kind) if field in record]
        label = " · ".join(part for part in (self.name, name) if part)
        return Series(
            label,
            [self.after(record["step"] + 1) for record in of_kind],
            [None if record[field] is None else scale * record[field] for record in of_kind],
            dashed=dashed,
            colour=self.number,
        )

    @cached_property
    def noise_scale(self) -> Series:
        """Where it and its interval are numbers."""
        known = [
            record
            for record in self.of("noise")
            if None not in (record.get(name) for name in ("noise_scale", "low", "high"))
        ]
        return Series(
            self.name,
            [self.after(record["step"] + 1) for record in known],
            [record["noise_scale"] for record in known],
            low=[record["low"] for record in known],
            high=[record["high"] for record in known],
            colour=self.number,
        )


def runs_page(folders: Sequence[Path], *, title: str | None = None, refresh: float | None = None) -> str:
    """HTML of the runs in these folders. OSError where one cannot be read."""
    names = _names(folders)
    runs = [
        _Run(RunDirectory(folder), name, number)
        for number, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]
    sections = [("Figures", _figures(runs))]
    if len(runs) > 1:
        sections.append(("Differences", _differences(runs)))
    after = [
        ("Events", _events(runs)),
        ("Evaluations", _evaluations(runs)),
        ("Recipe and environment", _sources(runs)),
    ]
    return page(
        title or (names[0] if len(runs) == 1 else f"{len(runs)} runs"),
        lead="",
        charts=_charts(runs),
        sections=[*sections, *((heading, body) for heading, body in after if body)],
        refresh=refresh,
    )


def write_report(run: RunDirectory, title: str) -> None:
    """Write report.html of a run."""
    replace_text(run.report, runs_page([run.path], title=title))


def _names(folders: Sequence[Path]) -> list[str]:
    names = [printable(folder.absolute().name) for folder in folders]
    return names if len(set(names)) == len(names) else [printable(str(folder)) for folder in folders]


def _charts(runs: Sequence[_Run]) -> list[Chart]:
    error = Chart("error", "Validation error", "epoch", "error (%)")
    loss = Chart("loss", "Loss", "epoch", "loss")
    rate = Chart("rate", "Learning rate", "epoch", "learning rate")
    speeds = Chart("speed", "Throughput", "epoch", "images/s")
    norm = Chart("norm", "Gradient norm, before clipping", "epoch", "norm of the mean gradient")
    memory = Chart("memory", "Most memory that a rank has held", "epoch", "GB")
    waits = Chart("wait", "Share of the time waiting for data", "epoch", "waiting (%)")
    slow = Chart("slow", "Slowest rank, times the median", "epoch", "times the median")
    noise = Chart("noise", "Gradient noise scale, its 95 % interval", "epoch", "images", cut_bands=True)
    charts = [error, loss, rate, norm, noise, speeds, waits, slow, memory]
    for run in runs:
        error.series += [
            run.curve("eval", "top1_error", "top-1"),
            run.curve("eval", "top5_error", "top-5", dashed=True),
        ]
        averaged = run.curve("eval", "ema_top1_error", "top-1 of averaged weights")
        if averaged.x:
            averaged.colour = run.number + len(runs)
            error.series.append(averaged)
        loss.series += [
            run.curve("train", "loss", "training"),
            run.curve("eval", "loss", "validation", dashed=True),
        ]
        rate.series.append(run.curve("train", "lr"))
        speeds.series.append(run.curve("train", "images_per_second"))
        waits.series.append(run.curve("train", "data_wait", scale=100))
        norm.series.append(run.curve("train", "gradient_norm"))
        memory.series.append(run.curve("train", "peak_memory_gb"))
        slow.series.append(run.curve("ranks", "slower"))
        noise.series.append(run.noise_scale)
        for chart in charts:
            chart.marks += [
                Mark(
                    run.after(event.step),
                    " · ".join(
                        part for part in (run.name if len(runs) > 1 else "", event.kind, event.text) if part
                    ),
                    run.number if len(runs) > 1 else None,
                )
                for event in run.events
                if event.step is not None
            ]
    if len(runs) == 1:  # whose name is the title
        for series in (series for chart in charts for series in chart.series):
            series.name = series.name.removeprefix(runs[0].name).removeprefix(" · ") or "this run"
    return charts


def _figures(runs: Sequence[_Run]) -> str:
    of_runs = [_figures_of(run) for run in runs]
    lines = [[name, *values] for name, *values in zip(_FIGURES, *of_runs, strict=True)]
    return (
        table(["", *(run.name for run in runs)], lines) if len(runs) > 1 else rows([(a, b) for a, b in lines])
    )


_FIGURES = (
    "ended",
    "steps",
    "last top-1 error",
    "last top-5 error",
    "best top-1 error",
    "speed",
    "wall time",
)


def _figures_of(run: _Run) -> list[str]:
    summary, evaluations = run.summary, run.of("eval")
    last = evaluations[-1] if evaluations else {}
    best = {error: of for of in evaluations if (error := counted_error(of)) is not None}
    trained = run.of("train")
    steps = summary.get("steps") or (trained[-1]["step"] + 1 if trained else 0)
    total = (
        summary.get("total_steps")
        or run.after.total_steps
        or read_json(run.directory.launching).get("total_steps")
    )
    rates = [record["images_per_second"] for record in trained if record.get("images_per_second") is not None]
    rate = summary.get("images_per_second") or (sorted(rates)[len(rates) // 2] if rates else None)
    return [
        str(summary.get("exit_reason") or "not yet"),
        f"{steps:,}" + (f" of {total:,}" if total else ""),
        _error(last, "top1_error"),
        _error(last, "top5_error"),
        f"{min(best):.2f} %{' of averaged weights' if 'ema_top1_error' in best[min(best)] else ''}"
        if best
        else "–",
        f"{speed(rate)} (median)" if rate else "–",
        duration(summary["wall_seconds"]) if summary.get("wall_seconds") else "–",
    ]


def _error(record: dict[str, Any], name: str) -> str:
    """Of an evaluation, if there was any: of the weights, and of their average where it has one."""
    if not record:
        return "–"
    averaged = (
        f", {figure(record[f'ema_{name}'], '.2f')} % of averaged weights" if f"ema_{name}" in record else ""
    )
    return f"{figure(record.get(name), '.2f')} %{averaged}"


def _differences(runs: Sequence[_Run]) -> str:
    """Fields of recipes and environments in which the runs are not alike."""
    lines = []
    for topic, contents in (
        ("recipe", [run.recipe for run in runs]),
        ("environment", [_flat(run.environment) for run in runs]),
    ):
        names = list(dict.fromkeys(name for content in contents for name in content))
        for name in names:
            values = [_value(content.get(name)) for content in contents]
            if len(set(values)) > 1:
                lines.append([f"{topic}: {name}", *values])
    if not lines:
        return "<p>Recipes and environments are the same.</p>"
    return table(["", *(run.name for run in runs)], lines)


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Entries of inner objects as entries of their own."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{name} {key}": of for key, of in value.items()}
        elif name == "command" and isinstance(value, list):
            flat[name] = shlex.join(map(str, value))
        else:
            flat[name] = value
    return flat


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _events(runs: Sequence[_Run]) -> str:
    lines = [
        [
            *([run.name] if len(runs) > 1 else []),
            "" if event.step is None else f"{event.step:,}",
            event.kind,
            printable(event.text),
        ]
        for run in runs
        for event in run.events
    ]
    return table([*(["run"] if len(runs) > 1 else []), "step", "what", ""], lines) if lines else ""


def _evaluations(runs: Sequence[_Run]) -> str:
    averaged = any("ema_top1_error" in record for run in runs for record in run.of("eval"))

    def cells(record: dict[str, Any]) -> list[str]:
        of_average = ("ema_top1_error", "ema_top5_error") if averaged else ()
        return [
            str(record.get("epoch")),
            f"{record['step']:,}",
            figure(record.get("top1_error"), ".2f"),
            figure(record.get("top5_error"), ".2f"),
            *(figure(record[name], ".2f") if name in record else "" for name in of_average),
            figure(record.get("loss"), ".4f"),
            figure(record.get("images"), ","),
        ]

    errors = ["top-1 error (%)", "top-5 error (%)"]
    errors += [f"{error.removesuffix(' (%)')}, averaged weights (%)" for error in errors] if averaged else []
    heads = ["epoch", "step", *errors, "loss", "images"]
    several = len(runs) > 1
    lines = [[*([run.name] if several else []), *cells(record)] for run in runs for record in run.of("eval")]
    if not lines:
        return ""
    shown = table([*(["run"] if several else []), *heads], lines[-_MOST_LINES:], numbers=len(heads))
    if len(lines) <= _FEW_LINES:
        return shown
    which = f"the last {_MOST_LINES} of {len(lines):,}" if len(lines) > _MOST_LINES else f"all {len(lines)}"
    return f"<details><summary>{which}</summary>{shown}</details>"


def _sources(runs: Sequence[_Run]) -> str:
    parts = []
    for run in runs:
        of = f"{run.name}: " if len(runs) > 1 else ""
        for path in (run.directory.recipe, run.directory.environment):
            if path.exists():
                parts.append(folded(f"{of}{path.name}", path.read_text("utf-8", errors="replace")))
    return "".join(parts)
