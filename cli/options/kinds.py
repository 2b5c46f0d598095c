"""Kinds of values that several commands take."""

from __future__ import annotations

from typing import Any

import rich_click as click

THREADS = click.IntRange(1, 4096)


class Finite(click.FloatRange):
    """A range to which not-a-number does not belong."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return float(number)


FRACTION = Finite(0, 1, min_open=True, max_open=True)
