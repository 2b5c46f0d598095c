"""`hvd-lb status`: which runs there are, and how each is."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import rich_click as click

from hvd_lb.report.run_directory import strict_json
from hvd_lb_cli.output.show import print_rows
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.watch.argument import RUN

_WATCH_SECONDS = 2.0


@click.command()
@click.argument("run", type=RUN, required=False)
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    help="Without RUN: the folder whose runs are listed, those in folders in it included [runs]",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for scripts: one object, or a list of them.")
@click.option("--watch", is_flag=True, help="Again every two seconds; with RUN until the run has ended.")
def status(run: Path | None, runs: Path | None, as_json: bool, watch: bool) -> int:
    """Tell how runs are: far along, finished, failed and why, or lost. From any machine that sees their folders.

    \b
    hvd-lb status
    hvd-lb status runs/digits-resnet8-2x32-1a2b3c4d --watch
    hvd-lb status --runs /shared/runs --json
    """
    if run is not None and runs is not None:
        raise click.UsageError("RUN and --runs are both given: give one of them")
    while True:
        ended = _tell_of(run, as_json, watch) if run is not None else _list(runs, as_json)
        if not watch or ended:
            return 0
        time.sleep(_WATCH_SECONDS)


def _tell_of(run: Path, as_json: bool, watch: bool) -> bool:
    """Whether the run has ended."""
    from hvd_lb.watch.state import AT_WORK, look
    from hvd_lb_cli.watch.words import one_line, rows

    (state,) = look([run])
    if as_json:
        click.echo(strict_json(asdict(state)))
    elif watch:
        _line(one_line(state, 0))
    else:
        print_rows(plain_console(), rows(state))
    return state.state not in (*AT_WORK, "queued")


def _list(folder: Path | None, as_json: bool) -> bool:
    from hvd_lb.watch.state import find_runs, look
    from hvd_lb_cli.watch.words import one_line

    if folder is None and not Path("runs").is_dir():
        states = []
    else:
        states = look(find_runs((folder or Path("runs")).expanduser()))
    if as_json:
        click.echo(strict_json([asdict(state) for state in states]))
    elif not states:
        _line(f"no runs in {folder or 'runs'}: --runs names another folder")
    width = max((len(state.run) for state in states), default=0)
    for state in [] if as_json else states:
        _line(one_line(state, width))
    return False


def _line(text: str) -> None:
    plain_console().print(text, soft_wrap=True)
