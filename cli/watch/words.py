"""States of runs in words."""

from __future__ import annotations

import time

from hvd_lb.report.text import duration, evaluation_line, figure, printable, speed
from hvd_lb.watch.state import AT_WORK, RunState

_DAY = 86400


def one_line(state: RunState, width: int) -> str:
    """For a list: the run's name in `width` columns, its state, and how far it is."""
    return f"{printable(state.run):<{width}}  {state.state:<11}  {'  '.join(_figures(state))}".rstrip()


def _figures(state: RunState) -> list[str]:
    parts = []
    if state.steps is not None and state.total_steps:
        share = 100 * state.steps // state.total_steps
        parts.append(f"step {state.steps:,}/{state.total_steps:,} ({share} %)")
    if state.epochs:
        parts.append(f"epoch {state.epochs:.1f}")
    if state.state in AT_WORK:
        if state.doing:
            parts.append(f"{printable(state.doing['what'])} {100 * state.doing['share']:.0f} %")
        if state.images_per_second is not None:
            parts.append(speed(state.images_per_second))
        if state.seconds_left is not None:
            parts.append(f"{duration(state.seconds_left)} left")
    if state.evaluation:
        parts.append(f"top-1 error {figure(state.evaluation.get('top1_error'), '.2f')} %")
    if state.state in AT_WORK and state.launched_on and state.since:
        parts.append(f"on {state.launched_on} since {moment(state.since)}")
    if state.reason and state.reason != state.state:
        parts.append(printable(state.reason))
    return parts


def state_words(state: RunState) -> str:
    """The state and why, each said once: "failed: rank 3 …", "lost: its launching process …"."""
    own = state.reason.startswith(state.state)
    return printable(
        state.reason if own else f"{state.state}: {state.reason}" if state.reason else state.state
    )


def rows(state: RunState) -> list[tuple[str, str]]:
    """For one run: (topic, sentence)."""
    found = [("run", printable(state.run)), ("state", state_words(state))]
    if state.steps is not None:
        of = (
            f" of {state.total_steps:,} ({100 * state.steps // state.total_steps} %)"
            if state.total_steps
            else ""
        )
        epoch = f", epoch {state.epochs:.1f}" if state.epochs else ""
        found.append(("steps", f"{state.steps:,}{of}{epoch}"))
    if state.doing:
        found.append(("now", f"{printable(state.doing['what'])}, {100 * state.doing['share']:.0f} % done"))
    if state.images_per_second is not None:
        found.append(("speed", speed(state.images_per_second)))
    if state.seconds_left is not None:
        found.append(("time left", f"about {duration(state.seconds_left)}, without evaluations"))
    if state.evaluation:
        found.append(("last", evaluation_line(state.evaluation)))
    if state.processes:
        found.append(("processes", f"{state.processes} on {', '.join(map(printable, state.hosts))}"))
    if state.launched_on:
        job = f", in Slurm job {state.slurm_job}" if state.slurm_job else ""
        found.append(("launched by", f"process {state.pid} on {printable(state.launched_on)}{job}"))
    if state.since:
        found.append(("since", f"{moment(state.since)}, start {state.start}"))
    if state.last_sign_of_life and state.state == "lost":
        found.append(("last sign of life", f"{moment(state.last_sign_of_life)} by the file system's clock"))
    if state.slowest:
        times = figure(state.slowest["slower"], ".2f")
        where = f"rank {state.slowest['rank']} on {printable(str(state.slowest['host']))}"
        found.append(("slowest rank", f"{where}, {times} × the median ({state.slowest['reason']})"))
    if state.last_warning:
        found.append(("last warning", printable(state.last_warning)))
    found += [("error", printable(error)) for error in state.errors]
    return found


def moment(seconds: float) -> str:
    """A time of the clock, with the day unless it is within the last 12 hours."""
    near = abs(time.time() - seconds) < _DAY / 2
    return time.strftime("%H:%M:%S" if near else "%Y-%m-%d %H:%M", time.localtime(seconds))
