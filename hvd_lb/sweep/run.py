"""Taking a sweep's runs, several at once, each by a command of its own that anybody could have typed.

What has come to its end or diverged is left alone, what was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from hvd_lb.errors import UserError
from hvd_lb.launch.agent.process import dies_with_parent
from hvd_lb.report.lock import DirectoryLock
from hvd_lb.report.run_directory import read_json, replace_text
from hvd_lb.report.text import printable
from hvd_lb.sweep.plan import Point, Sweep

_LOOK_SECONDS = 0.1
_TAIL = 4096


@dataclass(frozen=True)
class Ended:
    """How the command of a point ended; `said` is its last line where it failed."""

    point: Point
    status: int
    seconds: float
    said: str = ""


@dataclass
class Commands:
    """The commands of points, at most `jobs` of them at a time; `options` are added to each."""

    sweep: Sweep
    jobs: int
    options: Sequence[str] = ()
    running: dict[str, tuple[Point, subprocess.Popen[bytes], float]] = field(default_factory=dict)

    def command(self, point: Point) -> list[str]:
        how = ["simulate", "--run"] if self.sweep.mode == "simulate" else ["train"]
        return [
            *(sys.executable, "-m", "hvd_lb_cli.main", *how),
            *("--recipe", str(point.recipe_file.absolute()), "--output", str(point.run.path.absolute())),
            *self.options,
        ]

    def run(
        self,
        points: Sequence[Point],
        on_end: Callable[[Ended], None],
        on_look: Callable[[], None],
        on_interrupt: Callable[[], None],
    ) -> None:
        """All of them to their ends. KeyboardInterrupt, when they have ended with checkpoints; told when it begins."""
        waiting = list(points)
        try:
            while waiting or self.running:
                while len(self.running) < self.jobs and (free := _first_free(waiting)):
                    waiting.remove(free)
                    self._start(free)
                for ended in self._ended():
                    on_end(ended)
                on_look()
                time.sleep(_LOOK_SECONDS)
        except BaseException:
            if self.running:
                on_interrupt()
            self._interrupt()
            raise

    def _start(self, point: Point) -> None:
        for folder in (point.recipe_file.parent, point.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        replace_text(point.recipe_file, point.recipe.to_yaml())
        with point.log.open("wb") as log:
            # A session of its own: Ctrl-C comes here, and is passed on once.
            process = subprocess.Popen(
                self.command(point),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )
        self.running[point.name] = point, process, time.monotonic()

    def _ended(self) -> Iterator[Ended]:
        for name, (point, process, began) in list(self.running.items()):
            if (status := process.poll()) is not None:
                del self.running[name]
                said = _last_line(point) if status else ""
                yield Ended(point, status, time.monotonic() - began, said)

    def _interrupt(self) -> None:
        """A further signal meanwhile ends the runs at once, as one that comes to a run does."""
        while self.running:
            try:
                for _, process, _ in self.running.values():
                    process.send_signal(signal.SIGINT)
                while any(process.poll() is None for _, process, _ in self.running.values()):
                    time.sleep(_LOOK_SECONDS)
                self.running.clear()
            except KeyboardInterrupt:
                continue

    def progress(self) -> dict[str, float]:
        """Of each running point the share of its steps that is done, as far as it tells."""
        shares = {}
        for name, (point, _, _) in self.running.items():
            total = read_json(point.run.launching).get("total_steps")
            shares[name] = (read_json(point.run.heartbeat).get("step") or 0) / total if total else 0.0
        return shares


@contextmanager
def held(sweep: Sweep) -> Iterator[None]:
    """One command at a time runs a sweep. UserError when another does, or it cannot be written."""
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{printable(str(sweep.folder))} cannot be made ({error.strerror}): choose another folder"
        ) from None
    try:
        lock = DirectoryLock(sweep.folder, sweep.folder / "lock.json")
    except UserError:
        raise UserError(
            f"{printable(str(sweep.folder))}: its runs are being taken by another `hvd-lb sweep run`: wait for it, or "
            "end it"
        ) from None
    try:
        sweep.save()
        yield
    finally:
        lock.close()


def _first_free(points: Sequence[Point]) -> Point | None:
    """The first that no other run holds: the ranks of one that was killed are gone seconds later."""
    for point in points:
        try:
            if point.run.path.is_dir():
                DirectoryLock(point.run.path, point.run.logs / "lock.json").close()
        except UserError:
            continue
        return point
    return None


def _last_line(point: Point) -> str:
    text = point.log.read_bytes()[-_TAIL:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("hvd-lb: error: ")]
    return (wrong or lines or [f"nothing; see {point.log}"])[-1].removeprefix("hvd-lb: error: ")
