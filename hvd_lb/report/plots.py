"""The training curve as a picture: error, loss and learning rate over epochs, as in the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_curves(records: list[dict[str, Any]], steps_per_epoch: int, title: str, path: Path) -> None:
    """Write a PNG of a run's metrics (records of metrics.jsonl)."""
    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    error, loss, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))

    def epochs(of: list[dict[str, Any]]) -> list[float]:
        return [(record["step"] + 1) / steps_per_epoch for record in of]

    error.plot(epochs(evaluations), [record["top1_error"] for record in evaluations], marker=".", color="C3")
    error.set_ylabel("top-1 error, validation (%)")
    if evaluations:
        error.annotate(
            f"{evaluations[-1]['top1_error']:.2f} %",
            (epochs(evaluations)[-1], evaluations[-1]["top1_error"]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right",
        )
    loss.plot(epochs(train), [record["loss"] for record in train], label="training", linewidth=1)
    loss.plot(
        epochs(evaluations),
        [record["loss"] for record in evaluations],
        label="validation",
        marker=".",
        color="C3",
    )
    loss.set_ylabel("loss")
    loss.legend(loc="upper right")
    rate.plot(epochs(train), [record["lr"] for record in train], color="C2")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    for axes in (error, loss, rate):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
