"""Where the validation images of a data set come from, for the commands that take one: as with `train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rich_click as click


def split_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --val and --val-fraction."""
    fraction = click.option(
        "--val-fraction", type=float, help="Share held out where there is no val/ folder, as with `train`."
    )
    val = click.option(
        "--val",
        metavar="PATH",
        help="Validation images that lie elsewhere: folder, list or shards, as with `train`.",
    )
    return val(fraction(command))
