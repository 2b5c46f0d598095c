"""`hvd-lb stop`: end a run with a checkpoint, or at once."""

from __future__ import annotations

import time
from pathlib import Path

import rich_click as click
from rich.text import Text

from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.watch.argument import RUN

_LOOK_SECONDS = 0.5


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--now", "at_once", is_flag=True, help="At once: what was trained since the last checkpoint is lost."
)
@click.option("--no-wait", is_flag=True, help="Ask, and do not wait until the run has ended.")
def stop(run: Path, at_once: bool, no_wait: bool) -> int:
    """End a run after its present step, with a checkpoint; the command that started it goes on there.

    It is as Ctrl-C where the run was started, and --now as a second one, but from any machine that sees the run
    directory. A job that has not started yet is taken out of its queue. Exit code 0 when the run runs no more.

    \b
    hvd-lb stop runs/digits-resnet8-2x32-1a2b3c4d
    hvd-lb stop runs/digits-resnet8-2x32-1a2b3c4d --now
    """
    from hvd_lb.launch.submit.slurm.queue import cancel
    from hvd_lb.report.run_directory import RunDirectory
    from hvd_lb.watch.state import AT_WORK, look
    from hvd_lb.watch.stop import ask_to_stop
    from hvd_lb_cli.watch.words import state_words

    (state,) = look([run])
    if state.state == "queued":
        _say(cancel(RunDirectory(run)))
        return 0
    if state.state not in AT_WORK:
        if at_once and state.state == "lost":
            ask_to_stop(RunDirectory(run), at_once=True)  # ranks that are left hear it
        _say(f"{state.run} is not running: {state_words(state)}")
        return 0
    ask_to_stop(RunDirectory(run), at_once=at_once)
    _say(
        f"{state.run} is asked to end {'at once' if at_once else 'after its present step, with a checkpoint'}"
    )
    if no_wait:
        return 0
    with plain_console().status(Text("waiting")) as waiting:
        while state.alive:  # until the same command can be typed again
            time.sleep(_LOOK_SECONDS)
            (state,) = look([run])
            waiting.update(Text(f"waiting: step {state.steps or 0:,}"))
    _say(f"{state.run} has ended after {state.steps or 0:,} steps: {state_words(state)}")
    return 0 if state.state in ("interrupted", "finished") else 1


def _say(text: str) -> None:
    from hvd_lb.report.text import printable

    plain_console().print(printable(text), soft_wrap=True)
