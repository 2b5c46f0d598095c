"""Kinds of values that several commands take."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import rich_click as click

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)

THREADS = click.IntRange(1, 4096)


class Finite(click.FloatRange):
    """A range of numbers that are finite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return float(number)


FRACTION = Finite(0, 1, min_open=True, max_open=True)


class Target(click.Path):
    """Where to write to: no address, which would become a folder called `s3:` here."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if _ADDRESS.match(given := os.fspath(value)) and not os.path.lexists(given):
            self.fail(
                f"{given} is an address, and nothing is written to servers: give a path on a disk or a shared file "
                "system, and copy from there, or mount it.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)
