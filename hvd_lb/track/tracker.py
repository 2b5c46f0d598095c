"""What a tracker can do, and what a run is for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Ending = Literal["finished", "interrupted", "failed"]
Point = tuple[int, dict[str, float]]
"""A step, and numbers of it by name."""

# Names of numbers that do not tell their unit by themselves; errors are in per cent, times in seconds.
_WITH_UNIT = {
    "lr": "learning_rate",
    **{f"{of}{name}": f"{of}{name}_percent" for of in ("", "ema_") for name in ("top1_error", "top5_error")},
    "data_wait": "data_wait_share",
    "noise_scale": "noise_scale_images",
    "low": "low_images",
    "high": "high_images",
    "median": "median_seconds",
    "slower": "slowest_of_median",
}
# Kinds of records that are curves. Others are events, digests and notes.
_CURVES = ("train", "eval", "checkpoint", "noise", "ranks", "recovered")
_NOT_CURVES = ("epoch", "step", "slowest", "reason")


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers tell of it: `parameters` are the recipe's fields, `facts` how it is computed."""

    name: str
    folder: str
    parameters: dict[str, str]
    facts: dict[str, str]


class Tracker(Protocol):
    """One service. It is called from one thread, in the order of the run; whatever it raises is the tracker's affair
    and none of the run.
    """

    def open(self, run: TrackedRun, identity: str | None) -> str:
        """Begin a tracked run, or go on with the one of this identity; the identity."""
        ...

    def numbers(self, points: Sequence[Point]) -> None:
        """Those of some steps: what has come together while the ones before were told."""
        ...

    def text(self, name: str, text: str) -> None:
        """A text file of the run, which takes the place of an earlier one of that name."""
        ...

    def close(self, ending: Ending) -> None: ...


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """Points of curves in a record of metrics.jsonl, by names with units: {"eval/top1_error_percent": 23.6}."""
    kind = record.get("kind")
    if kind not in _CURVES:
        return {}
    return {
        f"{kind}/{_WITH_UNIT.get(name, name)}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NOT_CURVES
    }
