"""The training curve as a picture: error, loss and learning rate over epochs, as in the paper's figures."""

from __future__ import annotations

import io
import math
import os
import warnings
from typing import TYPE_CHECKING, Any

from hvd_lb.report.metrics import Epochs
from hvd_lb.report.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(records: list[dict[str, Any]], steps_per_epoch: int, title: str) -> bytes:
    """A PNG of a run's metrics (records of metrics.jsonl), the same whatever the user's matplotlibrc says."""
    # Read when matplotlib is loaded. Here is no window; a notebook's backend may not even be installed.
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        mpl.rcdefaults()
        mpl.rcParams["text.parse_math"] = False  # $ in a title is a dollar
        png = io.BytesIO()
        _draw(records, steps_per_epoch, printable(title)).savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw(records: list[dict[str, Any]], steps_per_epoch: int, title: str) -> Figure:
    from matplotlib.figure import Figure

    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "eval"]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    error, loss, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))

    after = Epochs(records, steps_per_epoch)

    def epochs(of: list[dict[str, Any]]) -> list[float]:
        return [after(record["step"] + 1) for record in of]

    def values(of: list[dict[str, Any]], name: str) -> list[float]:
        return [math.nan if (value := record.get(name)) is None else value for record in of]

    error.plot(epochs(evaluations), values(evaluations, "top1_error"), marker=".", color="C3")
    error.set_ylabel("top-1 error, validation (%)")
    if evaluations and (last := evaluations[-1].get("top1_error")) is not None:
        error.annotate(
            f"{last:.2f} %",
            (epochs(evaluations)[-1], last),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right",
        )
    loss.plot(epochs(train), values(train, "loss"), label="training", linewidth=1)
    loss.plot(epochs(evaluations), values(evaluations, "loss"), label="validation", marker=".", color="C3")
    loss.set_ylabel("loss")
    loss.legend(loc="upper right")
    rate.plot(epochs(train), values(train, "lr"), color="C2")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (error, loss, rate):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.suptitle(title)
    return figure
