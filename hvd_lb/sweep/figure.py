"""A sweep as the paper's figures: error against minibatch (Figure 1), curves of settings over each other (Figure 2).

Both are charts of `hvd_lb.report.page.chart`, so a page shows them as it shows those of a run; here they are drawn as
PNG.
"""

from __future__ import annotations

import io
import os
import statistics
import warnings
from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from hvd_lb.report.metrics import read_metrics
from hvd_lb.report.page.chart import Chart, Mark, Series
from hvd_lb.report.text import printable
from hvd_lb.sweep.plan import Setting, Sweep
from hvd_lb.sweep.results import Result, has_ended, whose_error, within_noise
from hvd_lb.training.saved_state import counted_error

_AS_IT_IS = "the recipe as it is"  # but for its minibatch
_WIDE = 3.0  # errors that are so many times others hide these on a linear axis


def minibatch_chart(
    sweep: Sweep, found: Sequence[Result], baseline: Result | None = None
) -> tuple[Chart, str]:
    """Error against minibatch with bars of two standard deviations, one line for settings that differ in `gpus` alone,
    broken where all runs diverged; and in a sentence up to which minibatch the error stays within the noise of the
    baseline, by default the smallest.
    """
    known = [result for result in found if result.mean is not None]
    chart = Chart(
        "minibatch",
        "Error against minibatch",
        "minibatch (images)",
        f"top-1 error{whose_error(sweep)}, validation (%)",
        log_x=True,
    )
    if not known:
        return chart, "No run has come to its end yet."
    baseline = baseline or min(known, key=lambda result: result.minibatch)
    lines: dict[str, list[Result]] = {}
    for result in found:
        others = Setting(tuple(item for item in result.setting.chosen if item[0] != "gpus"))
        lines.setdefault(others.name if others.chosen else _AS_IT_IS, []).append(result)
    sentences = []
    for name, of in lines.items():
        of = sorted(of, key=lambda result: result.minibatch)
        ended = [result for result in of if result.mean is not None or result.diverged]
        if not ended:
            continue
        bars = [(result.mean, 2 * (result.std or 0.0)) for result in ended]
        chart.series.append(
            Series(
                name,
                [float(result.minibatch) for result in ended],
                [mean for mean, _ in bars],
                low=[None if mean is None else mean - two for mean, two in bars],
                high=[None if mean is None else mean + two for mean, two in bars],
                bars=True,
            )
        )
        of_line = f" with {name}" if len(lines) > 1 else ""
        chart.marks += [
            Mark(
                float(result.minibatch),
                f"{result.diverged} of {result.planned} runs diverged{of_line}",
                len(chart.series) - 1,
            )
            for result in ended
            if result.diverged
        ]
        largest = within_noise(of, baseline)
        missing = [
            f"{len(result.errors)} of {result.planned} runs of {result.minibatch:,} images"
            for result in of
            if largest and result.minibatch <= largest.minibatch and len(result.errors) < result.planned
        ]
        so_far = f" (so far {', '.join(missing)})" if missing else ""
        sentences.append(f"{largest.minibatch:,} images{of_line}{so_far}" if largest else f"none{of_line}")
    if baseline.std is None:
        return (
            chart,
            "The baseline has a single finished run, so its noise is not known: give it more --seeds.",
        )
    limit = f"{baseline.mean:.2f} + 2 × {baseline.std:.2f} %"
    return chart, (
        f"Largest minibatch up to which the mean error is at most that of {baseline.minibatch:,} images and two of its "
        f"standard deviations ({limit}): {'; '.join(sentences)}."
    )


def curve_charts(sweep: Sweep, settings: Sequence[Setting]) -> list[Chart]:
    """Validation error and training loss over epochs of these settings, the mean over their seeds and its range.

    Of the runs that have ended, where there are any: means over other seeds in each epoch would be no curve.
    """
    error = Chart("error", "Validation error", "epoch", f"top-1 error{whose_error(sweep)}, validation (%)")
    loss = Chart("loss", "Training loss", "epoch", "loss")
    for setting in settings:
        begun = [point for point in sweep.points_of(setting) if point.run.metrics.exists()]
        ended = [point for point in begun if has_ended(point)]
        records = [read_metrics(point.run.metrics) for point in ended or begun]
        for chart, kind, value_of in ((error, "eval", counted_error), (loss, "train", itemgetter("loss"))):
            by_epoch: dict[int, list[float]] = {}
            for of_run in records:
                own: dict[int, list[float]] = {}
                for record in of_run:
                    if record.get("kind") == kind and (value := value_of(record)) is not None:
                        own.setdefault(record["epoch"], []).append(value)
                for epoch, values in own.items():
                    by_epoch.setdefault(epoch, []).append(
                        values[-1] if kind == "eval" else statistics.fmean(values)
                    )
            epochs = sorted(by_epoch)
            several = any(len(values) > 1 for values in by_epoch.values())
            chart.series.append(
                Series(
                    setting.name,
                    [epoch + 1.0 for epoch in epochs],
                    [statistics.fmean(by_epoch[epoch]) for epoch in epochs],
                    low=[min(by_epoch[epoch]) for epoch in epochs] if several else None,
                    high=[max(by_epoch[epoch]) for epoch in epochs] if several else None,
                )
            )
    return [error, loss]


def as_png(charts: Sequence[Chart], caption: str) -> bytes:
    """The same whatever the user's matplotlibrc says."""
    os.environ["MPLBACKEND"] = "agg"  # read when matplotlib is loaded; here is no window
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        mpl.rcdefaults()
        mpl.rcParams["text.parse_math"] = False
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator

        figure = Figure(figsize=(8, 4.6 * len(charts)), layout="constrained")
        for axes, chart in zip(figure.subplots(len(charts), 1, squeeze=False)[:, 0], charts, strict=True):
            for number, series in enumerate(chart.series):
                colour = f"C{number}"
                if series.bars and series.low and series.high:
                    y, low, high = (np.array(of, float) for of in (series.y, series.low, series.high))
                    axes.errorbar(
                        series.x,
                        y,
                        yerr=(y - low, high - y),
                        capsize=3,
                        marker="o",
                        color=colour,
                        label=series.name,
                    )
                else:
                    axes.plot(series.x, series.y, color=colour, label=series.name)
                    if series.low and series.high:
                        axes.fill_between(
                            series.x, series.low, series.high, color=colour, alpha=0.2, linewidth=0
                        )
            for number, mark in enumerate(
                chart.marks
            ):  # along the upper edge, each line's in a row of its own
                axes.plot(
                    mark.x,
                    0.97 - 0.05 * (mark.colour or 0),
                    "x",
                    color=f"C{mark.colour or 0}",
                    label="" if number else "some or all runs diverged",
                    transform=axes.get_xaxis_transform(),
                )
            if chart.log_x and chart.series:
                ticks = sorted({x for series in chart.series for x in series.x})
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            else:
                axes.locator_params(axis="x", integer=True)  # epochs
            heights = [y for series in chart.series for y in series.y if y]
            if chart.log_x and heights and max(heights) > _WIDE * min(heights):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            axes.set_xlabel(chart.x_label)
            axes.set_ylabel(chart.y_label)
            axes.grid(alpha=0.3)
            if (
                len(chart.series) > 1
                or chart.marks
                or any(series.name != _AS_IT_IS for series in chart.series)
            ):
                axes.legend()
        figure.suptitle(printable(caption), fontsize=9, wrap=True)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
