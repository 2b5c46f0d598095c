"""`hvd-lb logs`: what a run's processes printed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from hvd_lb.errors import UserError
from hvd_lb.report.text import printable
from hvd_lb_cli.watch.argument import RUN

if TYPE_CHECKING:
    from hvd_lb.watch.logs import LogFile, LogReader

_LOOK_SECONDS = 0.5
_STATE_SECONDS = 3.0


class _Rank(click.ParamType[str]):
    """A rank's number, or all."""

    name = "rank"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NUMBER|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value != "all" and not (str(value).isascii() and str(value).isdecimal() and len(str(value)) < 8):
            self.fail(f"{value!r} is no rank: expected a number from 0 on, or all", param, ctx)
        return value if value == "all" else str(int(value))


@click.command()
@click.argument("run", type=RUN)
@click.option("--rank", type=_Rank(), help="That rank's log, or all ranks'.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until the run has ended.")
@click.option(
    "--lines", "-n", type=click.IntRange(0, 10**9), default=50, show_default=True, help="The last so many."
)
@click.option(
    "--attempt", type=click.IntRange(min=1), help="The logs of an earlier start, the first of them 1."
)
def logs(run: Path, rank: str | None, follow: bool, lines: int, attempt: int | None) -> int:
    """Show the logs of a run: those of its launching process and of rank 0, after the errors of ranks that failed.

    Where several logs are shown, each line begins with whose it is.

    \b
    hvd-lb logs runs/digits-resnet8-2x32-1a2b3c4d --follow
    hvd-lb logs RUN --rank 17 -n 200
    """
    from hvd_lb.report.run_directory import RunDirectory
    from hvd_lb.watch.logs import log_folder
    from hvd_lb.watch.state import error_lines

    if follow and attempt is not None:
        raise UserError(
            "--follow is for the present start, and --attempt for an earlier one: give one of them"
        )
    folder = log_folder(RunDirectory(run), attempt)
    for line in error_lines(folder) if rank is None else []:
        click.echo(f"error: {printable(line)}")
    reading = _Reading(folder, rank, lines)
    if not reading.show() and not follow and not error_lines(folder):
        click.echo(
            f"nothing in the logs of {printable(str(folder))}: all is well, or it has not begun",
            err=True,
        )
    while follow and _goes_on(run):
        end = time.monotonic() + _STATE_SECONDS
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            reading.show()
    reading.show()
    reading.end()
    return 0


def _goes_on(run: Path) -> bool:
    from hvd_lb.watch.state import AT_WORK, look

    return look([run])[0].state in (*AT_WORK, "queued")


class _Reading:
    """The logs that are shown, also those that come while they are followed."""

    def __init__(self, folder: Path, rank: str | None, last: int):
        self._folder, self._rank, self._last = folder, rank, last
        self._open: dict[LogFile, LogReader] = {}

    def show(self) -> bool:
        """Print what is new; whether there was anything."""
        from hvd_lb.watch.logs import LogReader, find_logs

        first = not self._open
        for log in find_logs(self._folder, self._rank):
            if log not in self._open:
                self._open[log] = LogReader(log.path, self._last if first else 10**9)
        shown = False
        for log, reader in self._open.items():
            shown |= self._print(log, reader.lines())
        return shown

    def end(self) -> None:
        for log, reader in self._open.items():
            self._print(log, reader.rest())

    def _print(self, log: LogFile, lines: list[str]) -> bool:
        label = f"{log.label}: " if self._rank in (None, "all") else ""
        for line in lines:
            click.echo(label + line)
        return bool(lines)
