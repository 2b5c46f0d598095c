"""What `hvd-lb replay` and `hvd-lb verify` have in common: where steps are taken again, and on which data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich_click as click
from rich.console import Console

from hvd_lb_cli.output.progress import long_progress

_OPTIONS = (
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the steps are taken again.",
    ),
    click.option("--data", help="Where the data of the run lie here, if not where its recipe says."),
    click.option(
        "--val", help="Where its validation images lie, if not beside them or where its recipe says."
    ),
)


def replay_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device, --data and --val."""
    return functools.reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)


Progress = Callable[[int, int, int], None]


@contextmanager
def steps_progress(console: Console, first: int, until: int) -> Iterator[Progress]:
    """For `on_microbatch(step, done, of)` while the steps from `first` to `until` are taken."""
    with long_progress(console) as on_progress:

        def show(step: int, done: int, of: int) -> None:
            if done == of:
                on_progress("steps", step - first + 1, until - first)

        yield show
