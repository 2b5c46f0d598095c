"""The argument FOLDER of the commands that read a sweep."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

FOLDER = click.argument("folder", type=click.Path(path_type=Path))

last_epochs = click.option(
    "--last",
    type=click.IntRange(1, 1_000_000),
    default=5,
    show_default=True,
    help="Epochs at a run's end whose median error counts, as in the paper.",
)
