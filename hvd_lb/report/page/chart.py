"""What is drawn: charts of series over one axis, thinned so that a page of a long run stays small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Points of a series; more than a screen has pixels say nothing more.
MOST_POINTS = 4000


@dataclass
class Series:
    """A line through (x, y), None where there is no number; `low` and `high` are its band, with `bars` error bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    bars: bool = False
    dashed: bool = False
    colour: int | None = None  #: a number of the palette, where several series belong together


@dataclass
class Mark:
    """Something that happened at x."""

    x: float
    text: str
    colour: int | None = None


@dataclass
class Chart:
    """Series over one axis; charts with the same `x_label` are zoomed together. With `cut_bands` the y axis is made for
    the lines, and their bands may reach out of it.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    log_x: bool = False
    cut_bands: bool = False

    def content(self) -> dict[str, Any]:
        """As JSON values, thinned."""
        return {**asdict(self), "series": [asdict(thinned(series)) for series in self.series]}


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """Of every stretch of a line that is too long the lowest and the highest point: no peak is lost."""
    if len(series.x) <= most or series.low is not None:
        return series
    size = math.ceil(2 * len(series.x) / most)
    kept: list[int] = []
    for start in range(0, len(series.x), size):
        stretch = range(start, min(start + size, len(series.x)))
        numbers = [(value, i) for i in stretch if (value := series.y[i]) is not None]
        kept += sorted({min(numbers)[1], max(numbers)[1]}) if numbers else [start]
    return Series(
        series.name,
        [series.x[i] for i in kept],
        [series.y[i] for i in kept],
        dashed=series.dashed,
        colour=series.colour,
    )
