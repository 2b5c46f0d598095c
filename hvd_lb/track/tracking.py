"""A run beside its directory: the launching process tells trackers what rank 0 has written there.

So whoever follows is one process, wherever the ranks are and however their number changes, and a tracker that hangs or
fails keeps no step waiting. Each has a thread of its own, in which what it does not take is tried again.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import MetricsFollower, read_metrics
from hvd_lb.report.page.events import HAPPENED, events
from hvd_lb.report.run_directory import RunDirectory, replace_text, strict_json
from hvd_lb.report.text import count, printable
from hvd_lb.track.target import TrackTarget
from hvd_lb.track.tracker import Ending, Point, TrackedRun, Tracker, numbers_of

_RETRY_SECONDS = 30.0
# So long the end of a run waits for a tracker that has not been told everything.
_CLOSE_SECONDS = 60.0
# Told at once, where that many have come together.
_MOST_POINTS = 200

_Message = Callable[[], object] | Point | None


class Tracking:
    """All trackers of one start of a run; records of steps from `first_step` on are told."""

    def __init__(
        self,
        targets: Sequence[TrackTarget],
        run: RunDirectory,
        recipe: Recipe,
        facts: Mapping[str, Any],
        first_step: int,
    ):
        self._run = run
        about = _tracked_run(run, recipe, facts)
        self._follower = MetricsFollower(run.metrics, first_step)
        self._known = _Known(run.tracking, recipe.digest())
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lines: list[_Line] = []
        for target in targets:
            try:
                tracker = _tracker(target, run)
            except Exception as error:  # a package that is there and does not load
                self._notes.put(_warning(target, error, "the run is not tracked there"))
            else:
                line = _Line(target, tracker, self._known, about, self._notes.put)
                line.tell(partial(tracker.text, "recipe.yaml", recipe.to_yaml()))
                self._lines.append(line)

    def update(self) -> list[str]:
        """Tells what is new; notes of what went wrong meanwhile, for a person."""
        if self._lines:
            happened = False
            for record in self._follower.new_records():
                happened |= record.get("kind") in HAPPENED
                for line in self._lines:
                    line.record(record)
            if happened:
                self._tell_events()
        notes = []
        with suppress(queue.Empty):
            while True:
                notes.append(self._notes.get_nowait())
        return notes

    def close(self, status: int) -> list[str]:
        """The end of this start by its exit status, with the model card where there is a model; notes as above."""
        ending: Ending = "finished" if status == 0 else "failed" if status < 128 else "interrupted"
        notes = self.update()
        if not self._lines:
            return notes
        self._tell_events()
        try:
            told = _card(self._run)
        except Exception as error:  # of a run without a checkpoint, or on a full disk
            notes.append(f"trackers get no model card ({_one_line(error)})")
        else:
            for line in self._lines:
                line.tell(partial(line.tracker.text, "README.md", told))
        for line in self._lines:
            line.end(ending)
        until = time.monotonic() + _CLOSE_SECONDS
        for line in self._lines:
            line.thread.join(max(0.0, until - time.monotonic()))
        notes += self.update()
        return notes + [
            f"{line.target}: {count(left, 'message')} could not be told there"
            for line in self._lines
            if (left := line.left)
        ]

    def _tell_events(self) -> None:
        found = events(self._run, read_metrics(self._run.metrics))
        text = "".join(
            f"step {'?' if e.step is None else e.step}: {e.kind}: {printable(e.text)}\n" for e in found
        )
        for line in self._lines:
            line.tell(partial(line.tracker.text, "events.txt", text))


class _Line:
    """A tracker and the thread in which it is told everything, in order."""

    def __init__(
        self,
        target: TrackTarget,
        tracker: Tracker,
        known: _Known,
        about: TrackedRun,
        note: Callable[[str], None],
    ):
        self.target, self.tracker = target, tracker
        self._known, self._note = known, note
        self._messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._next: list[_Message] = []  # taken out, and not looked at
        self._ending, self._warned = threading.Event(), False
        self._told = known.told(target)
        self._sent = self._taken = 0  # each is counted by one thread
        self.tell(partial(self._open, about))
        self.thread = threading.Thread(target=self._work, name=f"hvd-lb {target.kind}", daemon=True)
        self.thread.start()

    @property
    def left(self) -> int:
        """Messages that it has not taken."""
        return self._sent - self._taken

    def record(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if record.get("kind") in (
            "rollback",
            "generation",
        ):  # steps from there on come again, perhaps as others
            self._told = min(self._told, record["to"])
        if step >= self._told and (numbers := numbers_of(record)):
            self.tell((step, numbers))

    def tell(self, message: Callable[[], object] | Point) -> None:
        self._sent += 1
        self._messages.put(message)

    def end(self, ending: Ending) -> None:
        self.tell(partial(self.tracker.close, ending))
        self._messages.put(None)
        self._ending.set()

    # In the thread

    def _open(self, about: TrackedRun) -> None:
        self._known.keep(self.target, id=self.tracker.open(about, self._known.identity(self.target)))

    def _numbers(self, points: Sequence[Point]) -> None:
        self.tracker.numbers(points)
        self._known.keep(self.target, told=points[-1][0])

    def _take(self) -> tuple[int, Callable[[], object] | None]:
        """How many messages, and what to do about them: points that are there are told together."""
        message = self._next.pop() if self._next else self._messages.get()
        points = list[Point]()
        while isinstance(message, tuple) and len(points) < _MOST_POINTS:
            points.append(message)
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return len(points), partial(self._numbers, points)
        if points:
            self._next.append(message)
            return len(points), partial(self._numbers, points)
        return 1, message  # type: ignore[return-value]

    def _work(self) -> None:
        while True:
            messages, tell = self._take()
            if tell is None:
                return
            last = False
            while True:
                try:
                    tell()
                    break
                except Exception as error:
                    if not self._warned:
                        self._warned = True
                        self._note(_warning(self.target, error, "training goes on, and it is tried again"))
                if last:
                    return
                last = self._ending.wait(_RETRY_SECONDS)
            self._taken += messages


@dataclass
class _Known:
    """tracking.json: as what the run is known to each tracker, and up to which step it was told.

    Steps before that are told no more by a start that takes them again. `recipe` is a digest: another one in the same
    directory, which had no checkpoint yet, is another tracked run.
    """

    path: Path
    recipe: str
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _content: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with suppress(OSError, ValueError):
            found = json.loads(self.path.read_bytes())
            if isinstance(found, dict):
                entries = {name: told for name, told in found.items() if isinstance(told, dict)}
                self._content = {
                    name: told for name, told in entries.items() if told.get("recipe") == self.recipe
                }

    def identity(self, target: TrackTarget) -> str | None:
        found = self._content.get(str(target), {}).get("id")
        return found if isinstance(found, str) else None

    def told(self, target: TrackTarget) -> int:
        found = self._content.get(str(target), {}).get("told")
        return found if isinstance(found, int) else 0

    def keep(self, target: TrackTarget, **told: Any) -> None:
        with self._lock:
            self._content.setdefault(str(target), {"recipe": self.recipe}).update(told)
            with suppress(OSError):  # the next time
                replace_text(self.path, strict_json(self._content, indent=1) + "\n", sync="id" in told)


def _tracked_run(run: RunDirectory, recipe: Recipe, facts: Mapping[str, Any]) -> TrackedRun:
    parameters = recipe.model_dump(mode="json", exclude_none=True)
    return TrackedRun(
        name=run.path.name,
        folder=printable(str(run.path)),
        parameters={name: _short(value) for name, value in parameters.items() if value != ""},
        facts={name: _short(value) for name, value in facts.items()},
    )


def _short(value: Any) -> str:
    """Of a list its parts with blanks between them; trackers take texts of some thousand letters."""
    return printable(" ".join(map(str, value)) if isinstance(value, list) else str(value))[:500]


def _card(run: RunDirectory) -> str:
    from hvd_lb.trained.card import Loading, model_card  # here: they load torch
    from hvd_lb.trained.weights import open_trained

    code = (
        "import torch\nfrom pathlib import Path\nfrom hvd_lb.trained.weights import open_trained\n\n"
        'network = open_trained(Path("model.safetensors")).network(torch.device("cpu"))\nlogits = network(x)'
    )
    return model_card(open_trained(run.path), Loading("hvd-lb", code))


def _tracker(target: TrackTarget, run: RunDirectory) -> Tracker:
    if target.kind == "mlflow":
        from hvd_lb.track.mlflow import MlflowTracker

        return MlflowTracker(target.where)
    if target.kind == "wandb":
        from hvd_lb.track.wandb import WandbTracker

        return WandbTracker(target.where, run.path)
    from hvd_lb.track.tensorboard import TensorBoardTracker

    return TensorBoardTracker(Path(target.where or run.path.parent / "tensorboard").expanduser().absolute())


def _warning(target: TrackTarget, error: Exception, what: str) -> str:
    return f"warning: {target}: {_one_line(error)}: {what}"


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__)[:300]
