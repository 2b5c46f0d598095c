"""The argument RUN of the commands that watch runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.report.text import printable


class _Run(click.Path):
    """A run directory."""

    name = "run"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from hvd_lb.watch.state import is_run

        path = Path(os.fsdecode(super().convert(value, param, ctx))).expanduser()
        if not is_run(path):
            raise UserError(
                f"{printable(str(path))} holds no run: expected a run directory, such as `hvd-lb status` lists"
            )
        return path


RUN = _Run()
