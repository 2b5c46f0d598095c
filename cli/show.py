"""What several commands print alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def print_plan(console: Console, rows: list[tuple[str, str]]) -> None:
    """A plan as (topic, sentence)."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for topic, sentence in rows:
        if console.is_terminal:
            table.add_row(topic, sentence)
        else:
            console.print(f"{topic}: {sentence}", highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(table, highlight=False)


@contextmanager
def index_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for `on_progress(label, done, total)`; shown when it is first called, on terminals only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, int] = {}

        def on_progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done)  # type: ignore[arg-type]

        yield on_progress
