"""A whole run as its launching process sees it: claim the run directory, start the ranks, watch, sum up."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from hvd_lb.data.images import fingerprint_note, refuse_other_images
from hvd_lb.errors import UserError
from hvd_lb.exact.reproducible import rounding_environment
from hvd_lb.launch.job import Job
from hvd_lb.launch.launch_plan import LaunchPlan, process_environment
from hvd_lb.launch.processes import RankProcesses
from hvd_lb.launch.resume import ResumePoint, find_resume_point
from hvd_lb.launch.stopping import SIGNALS
from hvd_lb.machine.environment import describe_environment
from hvd_lb.machine.placement import Placement
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import truncate_metrics
from hvd_lb.report.progress import RunView, open_display
from hvd_lb.report.run_directory import RunDirectory, replace_text, write_json
from hvd_lb.report.summary import summarise
from hvd_lb.resolve import Resolved
from hvd_lb.training.checkpoint import CheckpointStore

_LOOK_SECONDS = 0.2


def default_output(recipe: Recipe, prefix: str = "") -> Path:
    """runs/PREFIX DATA-MODEL-KxN-DIGEST: the same command finds its run again, another one gets another folder."""
    data = re.sub(r"[:{}*?\ud800-\udfff]+", "-", Path(recipe.data or "data").name)
    return (
        Path("runs") / f"{prefix}{data}-{recipe.model}-{recipe.gpus}x{recipe.per_gpu_batch}-{recipe.digest()}"
    )


def run_directory(output: Path | None, recipe: Recipe) -> RunDirectory:
    """UserError for a name that TensorBoard could not write to."""
    path = (output or default_output(recipe)).expanduser().absolute()
    if re.search("[\ud800-\udfff]", str(path)):
        raise UserError(f"--output {str(path)!r}: is no UTF-8; choose another name")
    return RunDirectory(path)


def resume_point_of(run: RunDirectory, resolved: Resolved, placement: Placement, resume: str) -> ResumePoint:
    """Where a run begins or goes on; reads only. UserError where it cannot."""
    environment = rounding_environment(placement.device)
    found = find_resume_point(run, resolved.recipe, resume, resolved.total_steps, environment)
    if found.checkpoint is None:
        return found
    known, present = found.checkpoint.saved.data, resolved.dataset.fingerprint()
    refuse_other_images(found.checkpoint.path, known, present, resolved.dataset.name)
    note = fingerprint_note(known, present)
    messages = [*found.messages, *([f"{found.checkpoint.path.name} {note}"] if note else [])]
    return replace(found, messages=messages)


def make_job(
    resolved: Resolved, placement: Placement, launch: LaunchPlan, run: RunDirectory, resume_point: ResumePoint
) -> Job:
    """What every process of the run is told."""
    return Job(
        recipe=resolved.recipe,
        output=run.path,
        device=placement.device,
        processes=placement.processes,
        threads=placement.threads,
        checkpoint=resume_point.checkpoint.path if resume_point.checkpoint else None,
        data_fingerprint=resolved.dataset.fingerprint(),
        starter=launch.starter,
        hosts=[(host.name, host.slots or 1) for host in launch.hosts],
        interfaces=dict(launch.interfaces),
        environment={**process_environment(placement.threads), **launch.environment},
    )


def run_job(
    resolved: Resolved,
    placement: Placement,
    launch: LaunchPlan,
    *,
    output: Path | None,
    resume: str,
    command: Sequence[str],
    console: Console,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Train as resolved, telling `on_ready` when all checks have passed.

    The exit status: 0 at the end, 1 when a rank failed, 128 + signal when interrupted. The first SIGINT or SIGTERM
    ends the run with a checkpoint after the present step, a second one ends it at once.
    """
    recipe = resolved.recipe
    run = run_directory(output, recipe)
    resume_point = resume_point_of(run, resolved, placement, resume)
    lock = run.lock()
    on_ready()
    replace_text(run.recipe, recipe.to_yaml())
    write_json(run.environment, describe_environment(placement, command))
    run.summary.unlink(missing_ok=True)
    truncate_metrics(run.metrics, resume_point.step, evaluation_due=resume_point.evaluation_due)
    truncate_metrics(run.bad_images, resume_point.step, evaluation_due=resume_point.evaluation_due)
    store = CheckpointStore(run.checkpoints)
    for path in resume_point.damaged:
        store.set_aside(path)
    store.discard_after(resume_point.step)
    for message in resume_point.messages:
        console.print(f"[yellow]warning:[/] {message}", soft_wrap=True, highlight=False)
    if resume_point.checkpoint:
        console.print(
            f"going on from step {resume_point.step} ({resume_point.checkpoint.path.name})", highlight=False
        )
    console.print(f"writing to {run.path}", soft_wrap=True, highlight=False)
    if resume_point.step >= resolved.total_steps and not resume_point.evaluation_due:
        return _finish(run, resolved, 0.0, console)

    job = make_job(resolved, placement, launch, run, resume_point)
    display = open_display(
        console,
        first_step=resume_point.step,
        total_steps=resolved.total_steps,
        steps_per_epoch=resolved.plan.steps_per_epoch,
    )
    began = time.monotonic()
    with _signals() as received:
        processes = RankProcesses(job, launch, run, lock)
        try:
            with RunView(run, display, resume_point.first_record) as view:
                while (status := processes.wait(_LOOK_SECONDS)) is None and len(received) < 2:
                    if received and not run.stop.exists():
                        processes.ask_to_stop(received[0])
                        display.note(
                            f"{received[0].name}: finishing this step, then a checkpoint; again to end at once"
                        )
                    view.update()
        finally:
            processes.stop()
        stopped = processes.stopped()
        if stopped or len(received) > 1:
            number = signal.Signals(stopped["signal"] if stopped else received[0])
            where = f"after {stopped['steps']:,} steps, with a checkpoint" if stopped else "at once"
            _sum_up(run, resolved, f"interrupted by {number.name}", time.monotonic() - began)
            goes_on = "there" if stopped else "from the last checkpoint"
            console.print(f"stopped {where}; the same command goes on {goes_on}", highlight=False)
            return 128 + number
    if status:
        failure = processes.failure(status)
        # Told first: where the disk is full, nothing can be summed up.
        print(f"hvd-lb: error: {failure}", file=sys.stderr)
        _sum_up(run, resolved, f"failed: {failure}", time.monotonic() - began)
        return 1
    return _finish(run, resolved, time.monotonic() - began, console)


def _finish(run: RunDirectory, resolved: Resolved, seconds: float, console: Console) -> int:
    """Report, summary (last: it says that all is there) and figures of a run that came to its end; exit status 0."""
    reason = "stopped at --steps" if resolved.stops_early else "finished"
    summary, figures = _summary(run, resolved, reason, seconds)
    from hvd_lb.report.html import write_report  # here: matplotlib would delay every start by a second

    write_report(run, run.path.name, resolved.plan.steps_per_epoch, figures)
    _conclude(run, summary)
    for name, value in figures:
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    console.print(f"report: {run.report}", highlight=False, soft_wrap=True)
    return 0


def _summary(
    run: RunDirectory, resolved: Resolved, reason: str, seconds: float
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    return summarise(
        run,
        reason,
        seconds,
        total_steps=resolved.total_steps,
        steps_per_epoch=resolved.plan.steps_per_epoch,
    )


def _sum_up(run: RunDirectory, resolved: Resolved, reason: str, seconds: float) -> None:
    """Write summary.json of a run that did not come to its end."""
    _conclude(run, _summary(run, resolved, reason, seconds)[0])


def _conclude(run: RunDirectory, summary: dict[str, Any]) -> None:
    write_json(run.summary, summary)
    run.heartbeat.unlink(missing_ok=True)


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM instead of being ended by them."""
    received: list[signal.Signals] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {sign: signal.signal(sign, receive) for sign in SIGNALS}
    try:
        yield received
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
