"""A whole run as its launching process sees it: claim the run directory, start the ranks, watch, sum up."""

from __future__ import annotations

import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

from hvd_lb.data.files.reading import retried
from hvd_lb.data.images import fingerprint_note, refuse_other_images
from hvd_lb.errors import UserError
from hvd_lb.exact.reproducible import rounding_environment
from hvd_lb.exact.rounding import rounding_differences
from hvd_lb.forecast.held import forecast_for, held_against
from hvd_lb.launch.failure import RankFailure
from hvd_lb.launch.hang.reports import HangReports
from hvd_lb.launch.hosts import in_words
from hvd_lb.launch.job import Job
from hvd_lb.launch.launch_plan import LaunchPlan, cycles, process_environment
from hvd_lb.launch.options import HANG_TIMEOUT
from hvd_lb.launch.preflight.discovery import Discovery
from hvd_lb.launch.processes import RankProcesses
from hvd_lb.launch.resume import ResumePoint, find_resume_point
from hvd_lb.launch.stopping import AT_ONCE, heeded_signals, read_wish
from hvd_lb.machine.environment import describe_environment
from hvd_lb.machine.placement import Placement
from hvd_lb.recipe import Recipe
from hvd_lb.report.launching import Recorded, SignOfLife
from hvd_lb.report.lock import DirectoryLock
from hvd_lb.report.metrics import Epochs, read_metrics, truncate_metrics
from hvd_lb.report.progress import Display, RunView, open_display
from hvd_lb.report.run_directory import RunDirectory, replace_bytes, replace_text, write_json
from hvd_lb.report.summary import FINISHED, STOPPED, summarise, told_by
from hvd_lb.report.text import count
from hvd_lb.resolve import Resolved
from hvd_lb.track.target import TrackTarget
from hvd_lb.track.tracking import Tracking
from hvd_lb.training.checkpoint import CheckpointStore
from hvd_lb.training.saved_state import Rescaled

_LOOK_SECONDS = 0.2
_IDENTITY_SECONDS = 2.0
_PATIENCE = 4  # times --hang-timeout more, where all processes of an elastic job hang


def default_output(recipe: Recipe, prefix: str = "") -> Path:
    """runs/PREFIX DATA-MODEL-KxN-DIGEST: the same command finds its run again, another one gets another folder."""
    data = re.sub(r"[:{}*?\ud800-\udfff]+", "-", Path(recipe.data or "data").name)
    return (
        Path("runs") / f"{prefix}{data}-{recipe.model}-{recipe.gpus}x{recipe.per_gpu_batch}-{recipe.digest()}"
    )


def run_directory(output: Path | None, recipe: Recipe) -> RunDirectory:
    return RunDirectory((output or default_output(recipe)).expanduser().absolute())


def resume_point_of(run: RunDirectory, resolved: Resolved, placement: Placement, resume: str) -> ResumePoint:
    """Where a run begins or goes on; reads only. UserError where it cannot."""
    resolved.dataset.refuse_among_classes(run.path)
    rounding = partial(_rounding_environment, placement)
    found = find_resume_point(run, resolved.recipe, resume, resolved.total_steps, rounding)
    if found.checkpoint is None:
        return found
    known, present = found.checkpoint.saved.data, resolved.dataset.fingerprint()
    refuse_other_images(found.checkpoint.path, known, present, resolved.dataset.name)
    note = fingerprint_note(known, present)
    messages = [*found.messages, *([f"{found.checkpoint.path.name} {note}"] if note else [])]
    return replace(found, messages=messages)


def _rounding_environment(placement: Placement) -> dict[str, Any]:
    """That of rank 0's host, whose versions are those here; what only torch could tell there is None."""
    if not placement.hosts:
        return rounding_environment(placement.device)
    there = {name: placement.first_host.get(name) for name in ("machine", "cpu_features", "cpu_capability")}
    gpu = placement.gpus[0] if placement.gpus else None
    device = gpu if placement.device == "cuda" else "cpu"
    return {**rounding_environment("cpu"), **there, "device": device}


def unlike_hosts(placement: Placement, hardware: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Where `hardware`, by host, is not that of rank 0, by which bits may differ: what is other, and on which hosts."""
    found: dict[str, list[str]] = {}
    for host, there in hardware.items():
        first = dict(placement.hardware[placement.hosts[0]])
        if placement.gpus:
            first["device"] = placement.gpus[0]
        if changes := rounding_differences(first, dict(there)):
            found.setdefault("; ".join(changes), []).append(host)
    return found


def _warnings_of_hardware(placement: Placement) -> list[str]:
    return [
        f"{in_words(hosts)}: other hardware than rank 0 has on {placement.hosts[0]} ({what}), which may compute other "
        "bits, and then so does this run: `hvd-lb doctor --selftest --hosts …` tells"
        for what, hosts in unlike_hosts(placement, placement.hardware).items()
    ]


def refuse_unaudited(recipe: Recipe) -> None:
    """UserError for a run of one process that is to be audited."""
    if recipe.audit:
        raise UserError(
            f"--audit {recipe.audit:g}: one process has nobody to compare with: give --processes 2 or more, "
            "or --audit 0"
        )


def make_job(
    resolved: Resolved,
    placement: Placement,
    launch: LaunchPlan,
    run: RunDirectory,
    resume_point: ResumePoint,
    elastic: int | None = None,
    log_samples: bool = False,
    max_processes: int | None = None,
    per_process: int | None = None,
) -> Job:
    """What every process of the run is told; `elastic` is the smallest number of processes of one that is elastic."""
    return Job(
        recipe=resolved.recipe,
        output=run.path,
        device=placement.device,
        processes=placement.processes,
        threads=placement.threads,
        pin=placement.pin,
        checkpoint=resume_point.checkpoint.path if resume_point.checkpoint else None,
        data_fingerprint=resolved.dataset.fingerprint(),
        engine=launch.engine,
        starter=launch.starter,
        hosts=[(host.name, host.slots or 1) for host in launch.hosts],
        interfaces=dict(launch.interfaces),
        environment={
            **process_environment(placement.threads, placement.device),
            **cycles(launch, placement.device, elastic is not None),
            **launch.environment,
        },
        elastic=elastic is not None,
        min_processes=elastic or 1,
        log_samples=log_samples,
        max_processes=max_processes,
        per_process=per_process,
    )


def rescaled(
    resolved: Resolved,
    placement: Placement,
    resume_point: ResumePoint,
    least: int | None,
    most: int | None = None,
) -> tuple[Resolved, int | None]:
    """The run with the k that it has from its resume point on, and how many virtual workers each process keeps.

    That is where k follows the number of processes, from `least` (None: it does not) to `most`. UserError where it did
    otherwise before, the processes do not divide k, or there is no run with some number of them.
    """
    recipe, processes, checkpoint = resolved.recipe, placement.processes, resume_point.checkpoint
    known = checkpoint.saved.rescaled if checkpoint else None
    if least is None:
        if known and checkpoint:
            raise UserError(
                f"{checkpoint.path} is of a run whose minibatch follows the number of processes, "
                f"{count(known['per_process'], 'virtual worker')} each: give --elastic --elastic-policy rescale as well"
            )
        return resolved, None
    if known:
        per_process, scales = known["per_process"], Rescaled.from_json(known).scales
    else:
        per_process, rest = divmod(recipe.gpus, processes)
        if rest or per_process % recipe.fixed_group:
            raise UserError(
                f"--elastic-policy rescale: each process keeps its virtual workers, and {recipe.gpus:,} cannot be the "
                f"same number of whole groups (--together) on each of {count(processes, 'process')}: give other "
                "--processes or --gpus"
            )
        scales = resolved.scales
    for there in range(least, (most or processes) + 1):
        try:
            recipe.run_schedule(recipe.rescaled(per_process * there).run_plan(len(resolved.dataset.train)))
        except UserError as error:
            raise UserError(
                f"--elastic-policy rescale with {count(there, 'process')} (--min-processes, --max-processes): {error}"
            ) from None
    plan = recipe.run_plan(len(resolved.dataset.train), resolved.dataset.train.labels, scales)
    return replace(resolved, scales=plan.rescaled(resume_point.step, per_process * processes)), per_process


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
    forecast: Path | None = None,
    elastic: int | None = None,
    log_samples: bool = False,
    track: Sequence[TrackTarget] = (),
    max_processes: int | None = None,
    discovery: Discovery | None = None,
    rescale: bool = False,
) -> int:
    """Train as resolved, telling `on_ready` when all checks have passed; at the end held against a `forecast`.

    `elastic`: going on when processes are lost, with at least so many, and on hosts of `discovery` with at most
    `max_processes`; with `rescale` the minibatch follows their number. `log_samples`: as the option says. `track`: who
    else is told of the run.

    The exit status: 0 at the end, and for a run that has come to it before; 1 when a rank failed, 128 + signal when
    interrupted. The first of `heeded_signals` ends the run with a checkpoint after the present step, a second one ends
    it at once.
    """
    run = run_directory(output, resolved.recipe)
    foretold = forecast_for(forecast, resolved.recipe, placement.processes) if forecast else None
    store = CheckpointStore(run.checkpoints)
    present = store.newest_first()
    resume_point = resume_point_of(run, resolved, placement, resume)
    if resume_point.finished:
        console.print(resume_point.finished, soft_wrap=True)
        return 0
    resolved, per_process = rescaled(
        resolved, placement, resume_point, elastic if rescale else None, max_processes
    )
    lock = run.lock()
    alive, said = SignOfLife(run), Recorded(console, run.launching_log)
    try:
        if store.newest_first() != present:
            raise UserError(
                f"another run has just ended in {run.path}: type the same command again to go on with it"
            )
        run.keep_logs()
        said.begin()
        on_ready()
        if foretold:
            replace_text(run.forecast, foretold.model_dump_json(indent=1) + "\n")
        run.summary.unlink(missing_ok=True)  # first: what it says of the run was by the recipe that is there
        replace_text(run.recipe, resolved.recipe.to_yaml())
        write_json(run.environment, describe_environment(placement, command))
        facts = _facts(resolved, placement, launch, resume_point, command)
        alive.begin(facts)
        for path in resume_point.damaged:
            store.set_aside(path)
        # First: while they are there, a start that is killed here goes on from them, and needs all records before.
        store.discard_after(resume_point.step)
        for path in (run.metrics, run.bad_images):
            truncate_metrics(path, resume_point.step, evaluation_due=resume_point.evaluation_due)
        other = _warnings_of_hardware(placement) if resolved.recipe.reproducible else []
        for message in filter(None, (*resume_point.messages, *other, lock.warning)):
            _warn(console, message)
        if resume_point.checkpoint:
            console.print(f"going on from step {resume_point.step} ({resume_point.checkpoint.path.name})")
        console.print(f"writing to {run.path}", soft_wrap=True)
        if resume_point.step >= resolved.total_steps and not resume_point.evaluation_due:
            return _finish(run, resolved, placement.processes, 0.0, console)
        job = make_job(
            resolved, placement, launch, run, resume_point, elastic, log_samples, max_processes, per_process
        )
        tracking = Tracking(track, run, resolved.recipe, facts, resume_point.first_record)
        status = 1
        try:
            status = _watch(job, launch, run, resolved, resume_point, lock, console, tracking, discovery)
        finally:
            for note in tracking.close(status):
                console.print(note, soft_wrap=True)
        return status
    finally:
        said.end()
        alive.end()
        lock.close()


def _facts(
    resolved: Resolved,
    placement: Placement,
    launch: LaunchPlan,
    resume_point: ResumePoint,
    command: Sequence[str],
) -> dict[str, Any]:
    """What `hvd-lb status` tells of a run beside its records."""
    return {
        "command": list(command),
        "starter": launch.starter,
        "processes": placement.processes,
        "hosts": [host.name for host in launch.hosts],
        "first_step": resume_point.step,
        "total_steps": resolved.total_steps,
        "steps_per_epoch": resolved.plan.steps_per_epoch,
        "global_batch": resolved.run_plan.plan.global_batch,
    }


def _watch(
    job: Job,
    launch: LaunchPlan,
    run: RunDirectory,
    resolved: Resolved,
    resume_point: ResumePoint,
    lock: DirectoryLock,
    console: Console,
    tracking: Tracking,
    discovery: Discovery | None,
) -> int:
    """Start the ranks, show what they do, and sum up what came of it; the exit status."""
    display = open_display(
        console,
        first_step=resume_point.step,
        total_steps=resolved.total_steps,
        steps_per_epoch=resolved.run_plan.plan.steps_per_epoch,
        offset=resolved.run_plan.offset,
    )
    began = time.monotonic()
    with _signals() as received:
        processes = RankProcesses(job, launch, run, lock.descriptor)
        try:
            with RunView(run, display, resume_point.first_record) as view, discovery or nullcontext():
                asked, hung = _Asked(processes, display), None
                identity = _Identity(run, lock)
                hangs = HangReports(run, processes.members, float(job.environment.get(HANG_TIMEOUT, 0)))
                while (status := processes.wait(_LOOK_SECONDS)) is None and len(received) < 2:
                    hangs.ranks = processes.members
                    if hung := _hopeless(job, processes, hangs, display):
                        break
                    _heed(read_wish(run.stop), received)
                    if len(received) == 1:
                        asked.to_stop(received[0])
                    for note in (*identity.restored(), *processes.notes(), *tracking.update()):
                        display.note(note)
                    for news in discovery.news() if discovery else ():
                        if isinstance(news, str):
                            display.note(news)
                        else:
                            processes.heed(news)
                    view.update()
            _heed(read_wish(run.stop), received)
        finally:
            processes.stop(ours=_is_ours(lock))
        stopped = processes.stopped()
        if (stopped and not stopped["gives_up"]) or len(received) > 1:
            number = signal.Signals(stopped["signal"] if stopped else received[0])
            where = f"after {stopped['steps']:,} steps, with a checkpoint" if stopped else "at once"
            _sum_up(run, resolved, f"interrupted by {number.name}", time.monotonic() - began, console)
            goes_on = "there" if stopped else "from the last checkpoint"
            console.print(f"stopped {where}; the same command goes on {goes_on}")
            return 128 + number
    failure: RankFailure | str | None
    if status or hung or stopped:
        failure = hung or retried(partial(processes.failure, status or 0), str(run.logs))
    else:
        failure = _cut_short(run, resolved)
    if failure:
        # Told first: where the disk is full, nothing can be summed up.
        print(f"hvd-lb: error: {failure}", file=sys.stderr)
        _sum_up(run, resolved, f"failed: {failure}", time.monotonic() - began, console)
        if stopped:
            console.print(
                f"after {stopped['steps']:,} steps, with a checkpoint; the same command goes on there"
            )
        return 1
    return _finish(run, resolved, job.processes, time.monotonic() - began, console)


def _cut_short(run: RunDirectory, resolved: Resolved) -> str | None:
    """What is wrong with ranks that all have ended with exit code 0, but not at the end of the run.

    By its records or, where the disk has not taken them, the newest checkpoint.
    """
    try:
        records = read_metrics(run.metrics)
        total_steps = Epochs(records, 0).total_steps or resolved.total_steps
        steps = max(told_by(records)["steps"], CheckpointStore(run.checkpoints).newest_step())
    except OSError:
        return None
    if steps >= total_steps:
        return None
    return (
        f"the ranks ended with exit code 0 after step {steps:,} of {total_steps:,}, without a word: something in their "
        f"programs has called exit (logs: {run.logs})"
    )


def _hopeless(job: Job, processes: RankProcesses, hangs: HangReports, display: Display) -> str | None:
    """Why a job that hangs has to be ended; None for one that does not hang, and while it may yet go on.

    In an elastic one those for whom others wait are ended. Where all wait for each other, as a connection is dead, they
    make others. Where none goes on, with its data most likely, a new process would do no better, and patience may.
    """
    hung = hangs.look()
    if not hung or not job.elastic:
        return hung
    if len(hangs.late) == len(hangs.ranks):
        return hung if hangs.lasted >= _PATIENCE * float(job.environment[HANG_TIMEOUT]) else None
    if hangs.late:
        display.note(f"{hung}; they are taken out")
        for rank in hangs.late:
            processes.signal(signal.SIGKILL, rank)
    else:
        display.note(f"{hung}; they connect anew")
        processes.connect_anew()
    hangs.begin_again()
    return None


def _heed(wish: str, received: list[signal.Signals]) -> None:
    """What `hvd-lb stop` asks for counts as signals that came here."""
    if wish == AT_ONCE:
        received += [signal.SIGINT] * (2 - len(received))
    elif wish.isdecimal() and not received:
        with suppress(ValueError):
            received.append(signal.Signals(int(wish)))


class _Asked:
    """Whether the ranks know that they are to stop."""

    def __init__(self, processes: RankProcesses, display: Display) -> None:
        self._processes, self._display = processes, display
        self._done, self._problem = False, ""

    def to_stop(self, number: signal.Signals) -> None:
        """Asks them, once; where the disk is full it has to be tried again."""
        if self._done:
            return
        try:
            self._processes.ask_to_stop(number)
        except OSError as error:
            if not self._problem:
                self._problem = error.strerror or type(error).__name__
                self._display.note(
                    f"{number.name}: the processes cannot be told yet ({self._problem}); again to end at once"
                )
            return
        self._done = True
        self._display.note(f"{number.name}: finishing this step, then a checkpoint; again to end at once")


class _Identity:
    """What makes a folder a run, and this one's: it is made again where somebody has removed the folder meanwhile."""

    def __init__(self, run: RunDirectory, lock: DirectoryLock) -> None:
        self._run, self._lock = run, lock
        # Of the job's file those need what is in it who join later; it is for its owner alone.
        files = (run.recipe, run.environment, run.job)
        self._files = {path: (path.read_text("utf-8"), stat.S_IMODE(path.stat().st_mode)) for path in files}
        self._looked = time.monotonic()

    def restored(self) -> Iterator[str]:
        """What there is to tell of it. UserError where another run is there now."""
        if time.monotonic() - self._looked < _IDENTITY_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            held = self._lock.is_held()
            if held and all(path.exists() for path in self._files):
                return
            self._run.logs.mkdir(parents=True, exist_ok=True)
            if not held:
                self._take_again()
            for path, (text, mode) in self._files.items():
                replace_text(path, text, mode=mode)
        except OSError:  # the file system is away: later
            return
        yield (
            f"{self._run.path}, or a part of it, was removed while this run writes there. It is made again, but what "
            "was removed is gone; the next checkpoint has all that is trained"
        )

    def _take_again(self) -> None:
        try:
            self._lock.take_again()
        except UserError:
            raise UserError(
                f"{self._run.path} was removed or renamed while this run wrote there, and another run is there now: "
                "this one ends"
            ) from None


def _is_ours(lock: DirectoryLock) -> bool:
    """Whether the run directory is this run's, as far as can be seen: not another one's that has its name now."""
    try:
        return lock.is_held()
    except OSError:
        return True


def _finish(run: RunDirectory, resolved: Resolved, processes: int, seconds: float, console: Console) -> int:
    """Summary, then curves and report, of a run that came to its end; the exit status is that of the summary."""
    reason = STOPPED if resolved.stops_early else FINISHED
    figures = _sum_up(run, resolved, reason, seconds, console)
    for name, value in (*(figures or ()), *_held(run, resolved.recipe, processes)):
        console.print(f"{name}: {value}", soft_wrap=True)
    if figures is None:
        _warn(console, f"the run is whole, but for {run.summary.name}: the same command makes it")
        return 1
    _report(run, resolved, console)
    return 0


def _held(run: RunDirectory, recipe: Recipe, processes: int) -> list[tuple[str, str]]:
    """What was foretold beside what happened, where something was; an error in this is none of the run."""
    try:
        if not run.forecast.exists():
            return []
        foretold = forecast_for(run.forecast, recipe, processes)
        return held_against(foretold, read_metrics(run.metrics), recipe.global_batch)
    except (OSError, UserError) as error:
        return [("forecast", f"not compared ({_one_line(error)})")]


def _report(run: RunDirectory, resolved: Resolved, console: Console) -> None:
    """Curves and page. They are a service: an error in making them, of whatever kind, is a warning."""
    try:
        from hvd_lb.report.plots import plot_curves  # here: matplotlib would delay every start by a second

        records = read_metrics(run.metrics)
        replace_bytes(run.curves, plot_curves(records, resolved.plan.steps_per_epoch, run.path.name))
    except Exception as error:
        _warn(console, f"{run.curves.name} could not be made ({_one_line(error)})")
    try:
        from hvd_lb.report.page.runs import write_report

        write_report(run, run.path.name)
    except Exception as error:
        _warn(console, f"{run.report.name} could not be made ({_one_line(error)})")
    else:
        console.print(f"report: {run.report}", soft_wrap=True)


def _sum_up(
    run: RunDirectory, resolved: Resolved, reason: str, seconds: float, console: Console
) -> list[tuple[str, str]] | None:
    """Write summary.json, which says that the run has ended and why; its figures in words.

    None, and a warning, where that cannot be done: what was trained is in the checkpoints.
    """
    try:
        summary, figures = retried(
            partial(
                summarise,
                run,
                reason,
                seconds,
                total_steps=resolved.total_steps,
                steps_per_epoch=resolved.plan.steps_per_epoch,
            ),
            str(run.metrics),
        )
        write_json(run.summary, summary)
    except (OSError, UserError) as error:
        _warn(console, f"{run.summary.name} could not be written ({_one_line(error)})")
        return None
    with suppress(OSError):
        run.heartbeat.unlink(missing_ok=True)
    return figures


def _warn(console: Console, message: str) -> None:
    console.print(Text.assemble(("warning:", "yellow"), " ", message), soft_wrap=True)


def _one_line(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects the signals that end a run instead of being ended by them."""
    received: list[signal.Signals] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {sign: signal.signal(sign, receive) for sign in heeded_signals()}
    try:
        yield received
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
