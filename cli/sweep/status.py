"""`hvd-lb sweep status`: how far the runs of a sweep are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import rich_click as click

from hvd_lb.report.run_directory import strict_json
from hvd_lb.report.text import count, printable
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.sweep.argument import FOLDER


@click.command()
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="As JSON: a list with an object for each run.")
def status(folder: Path, as_json: bool) -> None:
    """Tell of each run of a sweep whether it has ended, runs, waits or has failed, and how far it is."""
    from hvd_lb.sweep.plan import open_sweep
    from hvd_lb.sweep.results import error_in_words, error_of, has_diverged, has_ended
    from hvd_lb.watch.state import is_run, look

    sweep = open_sweep(folder.expanduser())
    points = sweep.points()
    begun = [point for point in points if is_run(point.run.path)]
    states = dict(
        zip((point.name for point in begun), look([point.run.path for point in begun]), strict=True)
    )
    told, console = [], plain_console()
    for point in points:
        state, error = states.get(point.name), error_of(point)
        word: str = state.state if state else "not begun"
        if word == "failed" and has_diverged(point):
            word = "diverged"
        if word == "finished" and not has_ended(point):
            word = "to go on"
        share = state.steps / state.total_steps if state and state.steps and state.total_steps else None
        told.append(
            {
                "run": str(point.run.path),
                "setting": dict(point.setting.values),
                "seed": point.recipe.seed,
                "state": word,
                "reason": state.reason if state else "",
                "share": share,
                "top1_error": error,
            }
        )
        if not as_json:
            far = f", {100 * share:.0f} %" if share and word != "finished" else ""
            why = (
                f": {state.reason}" if state and word in ("failed", "diverged", "lost", "interrupted") else ""
            )
            ended = f", {error_in_words(point, error)}" if error is not None else ""
            console.print(printable(f"{point.name}  {word}{far}{ended}{why}"), soft_wrap=True)
    if as_json:
        click.echo(strict_json(told))
        return
    counts = Counter(str(one["state"]) for one in told)
    console.print(
        f"{count(len(points), 'run')}: "
        + ", ".join(f"{number} {word}" for word, number in counts.most_common())
    )
