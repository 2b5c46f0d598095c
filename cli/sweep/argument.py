"""The argument FOLDER of the commands that read a sweep, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from hvd_lb.errors import UserError, nearest

if TYPE_CHECKING:
    from hvd_lb.sweep.plan import Sweep

FOLDER = click.argument("folder", type=click.Path(path_type=Path))

only_fields = click.option(
    "--vary",
    "only",
    metavar="FIELD",
    multiple=True,
    help="Only settings that are the recipe but for this field, or for these. [default: all settings]",
)

last_epochs = click.option(
    "--last",
    type=click.IntRange(1, 1_000_000),
    default=5,
    show_default=True,
    help="Epochs at a run's end whose median error counts, as in the paper.",
)


def check_only(only: Sequence[str], sweep: Sweep) -> list[str] | None:
    """Fields as `results` takes them; UserError for one that the sweep does not vary."""
    fields = [name.replace("-", "_") for name in only]
    for name in fields:
        if name not in sweep.fields():
            raise UserError(f"--vary {name} is not varied here{nearest(name, sweep.fields())}")
    return fields or None
