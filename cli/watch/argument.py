"""The argument RUN of the commands that watch runs."""

from __future__ import annotations

import os
import shutil
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
            found = "holds no run" if path.exists() else "does not exist"
            waiting = _waiting_jobs() if ctx and ctx.info_name in ("status", "stop") else ""
            raise UserError(
                f"{printable(str(path))} {found}: expected a run directory, such as `hvd-lb status` lists{waiting}"
            )
        return path


def _waiting_jobs() -> str:
    """What to type for those of Kubernetes, which have no run directory yet; nothing where there is no kubectl."""
    if not shutil.which("kubectl"):
        return ""
    return (
        "; jobs that wait in Kubernetes: `kubectl get mpijobs -A -l app.kubernetes.io/name=hvd-lb` lists them, "
        "`kubectl -n NAMESPACE delete mpijobs NAME` ends one"
    )


RUN = _Run()
