"""What several commands print alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hvd_lb.doctor.finding import Finding
from hvd_lb.launch.hosts import FEW, in_words
from hvd_lb.launch.preflight.judge import PreflightReport


def print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    """Rows of (topic, sentence)."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for topic, sentence in rows:
        if console.is_terminal:
            table.add_row(topic, sentence)
        else:
            console.print(f"{topic}: {sentence}", soft_wrap=True)
    if console.is_terminal:
        console.print(table)


def print_preflight(console: Console, report: PreflightReport) -> None:
    """What was found on each host: a table on a terminal, else a line for each finding that is worth one.

    Of many hosts those that are ready are one line, and so are those that have a fault in common.
    """
    ready = [host for host, findings in report.findings.items() if all(of.state == "ok" for of in findings)]
    many = len(report.findings) > FEW
    if console.is_terminal:
        table = Table("host", "", "state", "found", "fix", box=box.SIMPLE_HEAD)
        if many:
            for finding, hosts in report.wrong():
                _add(table, in_words(hosts), finding)
            if ready:
                _add(table, in_words(ready), Finding("ready", "ok", ""))
        else:
            for host, findings in report.findings.items():
                for number, finding in enumerate(findings):
                    _add(table, "" if number else host, finding)
        console.print(table)
        return
    for finding, hosts in report.wrong():
        fix = f"; fix: {finding.fix}" if finding.fix else ""
        console.print(f"wrong   {in_words(hosts)}  {finding.name}: {finding.detail}{fix}", soft_wrap=True)
    if many and ready:
        console.print(f"ok      {in_words(ready)}", soft_wrap=True)
        return
    for host in ready:
        found = ", ".join(f"{finding.name}: {finding.detail}" for finding in report.findings[host])
        console.print(f"ok      {host}  {found}", soft_wrap=True)


def _add(table: Table, hosts: str, finding: Finding) -> None:
    state = Text(finding.state, style="green" if finding.state == "ok" else "red")
    table.add_row(Text(hosts), finding.name, state, Text(finding.detail), Text(finding.fix))


@contextmanager
def index_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for `on_progress(label, done, total)`; shown when it is first called, on terminals only."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, int] = {}

        def on_progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done)  # type: ignore[arg-type]

        yield on_progress
