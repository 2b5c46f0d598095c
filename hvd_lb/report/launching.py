"""logs/launching.json: which process launches the run, and how far it is to go. It is there while that process is.

Its modification time is a sign of life. Whether a process on another machine is alive can be told only by what it does,
and clocks of machines differ: so who wants to know looks twice (`hvd_lb.watch.state`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleRenderable, NewLine, RenderHook
from rich.control import Control

from hvd_lb.machine.process import this_process
from hvd_lb.report.run_directory import RunDirectory, read_json, write_json

BEAT_SECONDS = 5.0


class SignOfLife:
    """From `begin` to `end` the run directory tells that this process launches the run, and of which `facts`.

    Nothing in here ends a run: where the disk is full or away, there is no sign of life for a while.
    """

    def __init__(self, run: RunDirectory):
        self._file, self._over = run.launching, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sign of life", daemon=True)

    def begin(self, facts: Mapping[str, Any]) -> None:
        self._content = {**this_process(), "since": time.time(), **facts}
        if job := os.environ.get("SLURM_JOB_ID"):
            self._content["slurm_job"] = job
        with suppress(OSError):
            write_json(self._file, self._content)
        self._thread.start()

    def end(self) -> None:
        """Another run's sign of life, in whose place the folder is now, stays."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):
            if read_json(self._file).items() >= this_process().items():
                self._file.unlink()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):
                try:
                    os.utime(self._file)  # no time is given: it is that of the file system, and takes no room
                except FileNotFoundError:  # the folder was removed, and made again
                    write_json(self._file, self._content)


class Recorded(RenderHook):
    """From `begin` to `end` a file gets what is printed on the console, too: as plain lines, without its moving bar."""

    def __init__(self, console: Console, file: Path):
        self._console, self._file = console, file
        self._record: Console | None = None

    def begin(self) -> None:
        with suppress(OSError):
            stream = self._file.open("a", encoding="utf-8", errors="backslashreplace")
            self._record = Console(
                file=stream, force_terminal=False, no_color=True, width=160, markup=False, emoji=False
            )
            self._console.push_render_hook(self)

    def end(self) -> None:
        if self._record:
            self._console.pop_render_hook()
            with suppress(OSError):
                self._record.file.close()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        told = [part for part in renderables if not isinstance(part, Control | NewLine)]
        if told and self._record:
            with suppress(OSError):
                self._record.print(*told, soft_wrap=True, sep="", end="\n")
        return renderables
