"""What becomes of runs, as their run directories tell: who is alive, how far, how it ended. Nothing is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hvd_lb.errors import UserError
from hvd_lb.launch.failure import read_errors
from hvd_lb.launch.submit.slurm.queue import submitted_job, waiting
from hvd_lb.machine.process import is_running
from hvd_lb.report.launching import BEAT_SECONDS
from hvd_lb.report.metrics import Epochs, last_records
from hvd_lb.report.run_directory import RunDirectory, read_json
from hvd_lb.report.summary import FINISHED, STOPPED
from hvd_lb.report.text import printable

Word = Literal["queued", "running", "stopping", "finished", "interrupted", "failed", "lost", "unknown"]
#: States of a run that has not ended.
AT_WORK = ("running", "stopping")

# A launching process of which nothing was heard for so long is waited for, and for so long.
_PATIENCE_SECONDS = 3 * BEAT_SECONDS
_LOOK_SECONDS = 0.5
_DEEPEST = 4


@dataclass(frozen=True)
class RunState:
    """One run. Numbers are None where nothing tells them; docs/run-directory.md has the meaning of each."""

    run: str
    state: Word
    reason: str
    alive: bool = False
    steps: int | None = None
    total_steps: int | None = None
    epochs: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    doing: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    slowest: dict[str, Any] | None = None
    last_warning: str | None = None
    errors: list[str] = field(default_factory=list)
    processes: int | None = None
    hosts: list[str] = field(default_factory=list)
    launched_on: str | None = None
    pid: int | None = None
    slurm_job: str | None = None
    since: float | None = None
    last_sign_of_life: float | None = None
    start: int = 1


def find_runs(folder: Path) -> list[Path]:
    """The run directories in `folder`, or itself if it is one; by name. UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{printable(str(folder))} is no folder: expected one with runs in it")
    return sorted(_runs(folder, 0))


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth < _DEEPEST:
        try:
            inside = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()]
        except OSError:
            return
        for path in inside:
            yield from _runs(path, depth + 1)


def is_run(folder: Path) -> bool:
    run = RunDirectory(folder)
    return run.recipe.is_file() or run.submitted.is_file()


def look(runs: Sequence[Path]) -> list[RunState]:
    """The state of each.

    Whether a process of another machine is alive is told by its signs of life. Clocks differ: where the last one seems
    old, the next is waited for (15 s, once for all runs together) before a run is called lost.
    """
    seen = [_Seen(RunDirectory(path)) for path in runs]
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while any(one.alive is None for one in seen) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        for one in seen:
            one.look_again()
    return [one.state() for one in seen]


class _Seen:
    """What was read of one run. `alive`: whether its launching process is, None as long as that is not known."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._launching = read_json(run.launching)
        self._sign = self._sign_of_life()
        self.alive: bool | None = False
        if self._launching:
            try:
                self.alive = is_running(self._launching)
            except (LookupError, TypeError, ValueError):
                self._launching = {}
        if self.alive is None and self._sign and 0 <= time.time() - self._sign[0] < _PATIENCE_SECONDS:
            self.alive = True

    def look_again(self) -> None:
        if self.alive is None and (sign := self._sign_of_life()) != self._sign:
            self._sign, self.alive = sign, sign is not None

    def _sign_of_life(self) -> tuple[float, bytes] | None:
        """When the launching process touched its file, by the file system's clock, and how far rank 0 said it was."""
        try:
            touched = self._run.launching.open("rb")  # opened: a client of NFS may else show what was
        except OSError:
            return None
        with touched:
            when = os.fstat(touched.fileno()).st_mtime
        try:
            return when, self._run.heartbeat.read_bytes()
        except OSError:
            return when, b""

    def state(self) -> RunState:
        summary, facts = read_json(self._run.summary), self._launching
        records = last_records(self._run.metrics)
        progress = read_json(self._run.heartbeat)
        steps = summary.get("steps") if summary else _steps_done(records, progress)
        rescaled = _last(records, "rescale")
        total = rescaled.get("total_steps") or facts.get("total_steps") or summary.get("total_steps")
        rate = _last(records, "train").get("images_per_second")
        word, reason = self._word(summary)
        left = None
        batch = rescaled.get("global_batch") or facts.get("global_batch")
        if word in AT_WORK and steps is not None and total and rate and batch:
            left = (total - steps) * batch / rate
        per_epoch = facts.get("steps_per_epoch")
        epochs = Epochs(records, per_epoch)(steps) if steps and per_epoch else None
        return RunState(
            run=str(self._run.path),
            state=word,
            reason=reason,
            alive=bool(self.alive),
            steps=steps,
            total_steps=total,
            epochs=summary.get("epochs") if summary else epochs,
            images_per_second=rate if word in AT_WORK else summary.get("images_per_second"),
            seconds_left=left,
            doing=_doing(progress, steps) if word in AT_WORK else None,
            evaluation=_last(records, "eval") or None,
            slowest=_slowest(_last(records, "ranks")),
            last_warning=_last(records, "warning").get("message"),
            errors=error_lines(self._run.logs),
            processes=facts.get("processes"),
            hosts=list(facts.get("hosts") or ()),
            launched_on=facts.get("host"),
            pid=facts.get("pid"),
            slurm_job=facts.get("slurm_job"),
            since=facts.get("since"),
            last_sign_of_life=self._sign[0] if self._sign else None,
            start=1 + sum(1 for _ in self._run.logs.glob("attempt-*")),
        )

    def _word(self, summary: dict[str, Any]) -> tuple[Word, str]:
        ended = str(summary.get("exit_reason") or "")
        if not self.alive and ended != FINISHED and (why := waiting(self._run)):
            return "queued", why
        if ended in (FINISHED, STOPPED):
            return "finished", ended
        if ended:
            return "failed" if ended.startswith("failed") else "interrupted", ended
        if self.alive:
            if self._run.stop.exists():
                return "stopping", "asked to stop"
            return "running", "" if self._run.heartbeat.exists() else "starting processes"
        if self._launching:
            who = f"process {self._launching.get('pid')} on {self._launching.get('host')}"
            return "lost", f"its launching process, {who}, is gone without a word"
        if job := submitted_job(self._run):
            return (
                "unknown",
                f"it was submitted as Slurm job {job}, and has neither started nor is it waiting here",
            )
        return "unknown", "it is not running, and nothing says how it ended"


def error_lines(logs: Path) -> list[str]:
    """What ranks wrote that failed, the first one first, one line each."""
    return [
        f"rank {error['rank']} on {error.get('host')}: {error['kind']}: {error['message']}"
        for error in read_errors(logs)
    ]


def _last(records: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((record for record in reversed(records) if record.get("kind") == kind), {})


def _slowest(ranks: dict[str, Any]) -> dict[str, Any] | None:
    """Of a record of all ranks, the one that takes longest."""
    if not isinstance(ranks.get("slowest"), int) or not ranks.get("slower"):
        return None
    return {"rank": ranks["slowest"], **{name: ranks.get(name) for name in ("host", "slower", "reason")}}


def _steps_done(records: Sequence[dict[str, Any]], progress: dict[str, Any]) -> int | None:
    """By the record and the sign of life that are newest."""
    steps = [record["step"] + 1 for record in records if record.get("kind") in ("train", "eval")][-1:]
    if isinstance(progress.get("step"), int):
        steps.append(progress["step"] + ("doing" in progress))
    return max(steps, default=None)


def _doing(progress: dict[str, Any], steps: int | None) -> dict[str, Any] | None:
    """What rank 0 does after the last step, such as its evaluation, and how much of that is done, from 0 to 1."""
    try:
        if progress["step"] + 1 != steps:
            return None
        return {"what": str(progress["doing"]), "share": progress["microbatch"] / progress["microbatches"]}
    except (LookupError, TypeError, ArithmeticError):
        return None
