"""Progress of work that takes minutes to hours: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from hvd_lb_cli.output.show import index_progress

_LINE_SECONDS = 10.0


@contextmanager
def long_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """For `on_progress(label, done, total)`: a line every ten seconds, and at the end of what had lines before."""
    if console.is_terminal:
        with index_progress(console) as on_progress:
            yield on_progress
        return
    last = time.monotonic()
    open_labels: set[str] = set()

    def show(label: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last < _LINE_SECONDS and not (done == total and label in open_labels):
            return
        last = time.monotonic()
        (open_labels.discard if done == total else open_labels.add)(label)
        share = f" ({100 * done // total} %)" if total else ""
        console.print(f"{label}: {done:,} of {total:,}{share}", soft_wrap=True)

    yield show
