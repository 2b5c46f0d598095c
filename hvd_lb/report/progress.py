"""Progress of a run, drawn by the launching process from what rank 0 writes: a live bar on a terminal, else lines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from hvd_lb.report.metrics import MetricsFollower
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.report.text import (
    audit_in_words,
    duration,
    evaluation_line,
    figure,
    generation_in_words,
    printable,
    rescale_in_words,
    speed,
)

# Piped output: how often a line of metrics may come, and after how long without any a sign of life does.
_LINE_SECONDS = 10.0
_QUIET_SECONDS = 60.0


class Display(Protocol):
    """Shows records as they come; `beat` says how far a step is: (step, microbatch, of how many).

    Where rank 0 is `doing` something else after a step, such as its evaluation, it says how far that is.
    """

    def train(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def rescale(self, record: dict[str, Any]) -> None: ...

    def beat(self, step: int, microbatch: int, microbatches: int, doing: str = "") -> None: ...

    def close(self) -> None: ...


def open_display(
    console: Console, *, first_step: int, total_steps: int, steps_per_epoch: int, offset: int = 0
) -> Display:
    """A live bar where the console is a terminal, else plain lines. `offset`: where epoch 0 would have begun."""
    if console.is_terminal:
        return LiveDisplay(console, first_step, total_steps, steps_per_epoch, offset)
    return PlainDisplay(console, total_steps)


class RunView:
    """Reads the run directory of a job and passes what is new on to a display; call `update` now and then."""

    def __init__(self, run: RunDirectory, display: Display, first_step: int):
        self._run, self._display = run, display
        self._follower = MetricsFollower(run.metrics, first_step)
        self._bad_images = MetricsFollower(run.bad_images, first_step)
        self._told_of_bad = False

    def __enter__(self) -> RunView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.update()
        self._display.close()

    def update(self) -> None:
        """What cannot be read just now, or is no record of ours, is left out: a display ends no run."""
        for record in self._follower.new_records():
            kind = record.get("kind")
            if kind == "train":
                self._display.train(record)
            elif kind == "eval":
                self._display.evaluation(record)
            elif kind == "together":
                self._display.note(together_line(record))
            elif kind == "repeat":
                again = f"epoch {record.get('epoch')} step {record['step']} is taken again"
                self._display.note(f"{again}: {record.get('reason')}")
            elif kind == "rollback":
                self._display.note(_rolled_back(record))
            elif kind == "rescale":
                self._display.rescale(record)
                where = f"epoch {record.get('epoch')} step {record['step']}"
                self._display.note(f"{where}: {rescale_in_words(record)}")
            elif kind == "audit":
                self._display.note(
                    f"warning: epoch {record.get('epoch')} step {record['step']}: {audit_in_words(record)}"
                )
            elif kind == "generation":
                self._display.note(
                    f"epoch {record.get('epoch')} step {record['step']}: {generation_in_words(record)}"
                )
            elif kind == "recovered":
                after = f"{figure(record.get('seconds'), '.1f')} s after the change was noticed"
                self._display.note(f"epoch {record.get('epoch')} step {record['step']} was taken {after}")
            elif kind == "warning":
                self._display.note(f"warning: {record.get('message')}")
        for bad in self._bad_images.new_records():
            if not self._told_of_bad:
                self._told_of_bad = True
                self._display.note(
                    f"epoch {bad.get('epoch')} step {bad['step']}: {printable(str(bad.get('path')))} cannot be decoded "
                    f"({bad.get('reason')}) and is skipped; all such cases are in {self._run.bad_images.name}"
                )
        try:
            beat = json.loads(self._run.heartbeat.read_bytes())
            step, done, of = (int(beat[name]) for name in ("step", "microbatch", "microbatches"))
        except (OSError, ValueError, LookupError, TypeError):
            return
        self._display.beat(step, done, max(of, 1), str(beat.get("doing", "")))


class LiveDisplay:
    """A bar and the newest metrics at the bottom; evaluations scroll by above them."""

    def __init__(
        self, console: Console, first_step: int, total_steps: int, steps_per_epoch: int, offset: int
    ):
        self._steps_per_epoch, self._offset = steps_per_epoch, offset
        self._rate = _Rate(total_steps)
        self._progress = _TwoLines(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
        )
        self._task = self._progress.add_task(
            "starting processes", total=total_steps, completed=first_step, metrics="", left=""
        )
        self._done = float(first_step)
        self._progress.start()

    def train(self, record: dict[str, Any]) -> None:
        self._progress.update(self._task, metrics=_metrics(record))
        self._move(record["step"], record["step"] + 1)

    def evaluation(self, record: dict[str, Any]) -> None:
        self.note(evaluation_line(record))

    def note(self, text: str) -> None:
        self._progress.console.print(text)

    def rescale(self, record: dict[str, Any]) -> None:
        self._steps_per_epoch, self._offset = record["steps_per_epoch"], record["offset"]
        self._rate.total = record["total_steps"]
        self._progress.update(self._task, total=record["total_steps"])

    def beat(self, step: int, microbatch: int, microbatches: int, doing: str = "") -> None:
        if doing:
            self._move(step, step + 1, doing_in_words(doing, microbatch, microbatches))
            return
        part = f"({microbatch}/{microbatches})" if microbatches > 1 else ""
        self._move(step, step + microbatch / microbatches, part)

    def _move(self, step: int, done: float, part: str = "") -> None:
        if done < self._done or (done == self._done and not part):
            return  # records and signs of life come on different ways
        words = f"epoch {(step - self._offset) // self._steps_per_epoch} step {step} {part}".rstrip()
        # Of steps: what follows one takes none of them further.
        left = self._rate.left(done) if done > self._done else self._progress.tasks[0].fields["left"]
        self._done = done
        self._progress.update(self._task, completed=done, description=words, left=left)

    def close(self) -> None:
        self._progress.stop()


class _TwoLines(Progress):
    """The bar, and the metrics under it: both fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["metrics"], no_wrap=True, overflow="ellipsis")


class PlainDisplay:
    """A line for each evaluation, one of metrics every ten seconds, and a sign of life within a slow step."""

    def __init__(self, console: Console, total_steps: int):
        self._console, self._rate = console, _Rate(total_steps)
        self._last = time.monotonic() - _LINE_SECONDS

    def train(self, record: dict[str, Any]) -> None:
        if self._silent_for(_LINE_SECONDS):
            left = self._rate.left(record["step"] + 1)
            where = f"epoch {record.get('epoch')} step {record['step']}/{self._rate.total}"
            self._line(f"{where}: {_metrics(record)}{left and ', '}{left}")

    def evaluation(self, record: dict[str, Any]) -> None:
        self.note(evaluation_line(record))

    def note(self, text: str) -> None:
        self._line(text)

    def rescale(self, record: dict[str, Any]) -> None:
        self._rate.total = record["total_steps"]

    def beat(self, step: int, microbatch: int, microbatches: int, doing: str = "") -> None:
        if self._silent_for(_QUIET_SECONDS):
            here = f"microbatch {microbatch} of {microbatches}"
            how_far = doing_in_words(doing, microbatch, microbatches) if doing else here
            self._line(f"step {step}/{self._rate.total}: {how_far}")

    def close(self) -> None:
        pass

    def _silent_for(self, seconds: float) -> bool:
        return time.monotonic() - self._last >= seconds

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.print(text, soft_wrap=True)


class _Rate:
    """Time left, from the steps done since this process looked first."""

    def __init__(self, total_steps: int):
        self.total = total_steps
        self._first: tuple[float, float] | None = None

    def left(self, done: float) -> str:
        now = time.monotonic()
        if self._first is None or done < self._first[0]:
            self._first = (done, now)
        steps, seconds = done - self._first[0], now - self._first[1]
        if done >= self.total:
            return ""
        if steps <= 0 or seconds <= 0:
            return "time left unknown"
        return f"{duration((self.total - done) * seconds / steps)} left"


def doing_in_words(what: str, done: int, of: int) -> str:
    """`evaluation, 24 % done`."""
    return f"{printable(what)}, {100 * done // of} % done"


def _metrics(record: dict[str, Any]) -> str:
    waiting = figure(record.get("data_wait"), ".0%").replace("%", " %")
    return (
        f"loss {figure(record.get('loss'), '.4f')}, lr {figure(record.get('lr'), '.4g')}, "
        f"{speed(record.get('images_per_second'))}, {waiting} waiting for data"
    )


def together_line(record: dict[str, Any]) -> str:
    """`from step 9 on 4 virtual workers … are computed together, which is fastest (1: 540 images/s, …)`."""
    size, why, speeds = record.get("together"), record.get("why"), record.get("images_per_second")
    alone = "virtual workers are computed one by one"
    if why:
        return f"{alone}: {why}"
    tried = speeds.items() if isinstance(speeds, dict) else ()
    figures = ", ".join(f"{of}: {speed(value)}" for of, value in tried if isinstance(value, int | float))
    what = alone if size == 1 else f"{size} virtual workers of a process are computed together"
    return f"from step {record['step'] + 1} on {what}, which is fastest ({figures})"


def _rolled_back(record: dict[str, Any]) -> str:
    where = f"epoch {record.get('epoch')} step {record['step']}"
    if record.get("left_out"):
        images = list(record.get("images") or ())
        ids = ", ".join(map(str, images[:8])) + (", …" if len(images) > 8 else "")
        return f"{where} (images {ids}) is left out; going on from step {record['to']}"
    return f"{where}: not finite any more; going back to step {record['to']} to find out which step it is"
