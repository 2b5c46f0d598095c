"""What the head writes into RUN/logs while ranks run: endings.jsonl, who ended how, and ranks.json, what all are doing.

A thread writes: a file system that hangs must not silence the head, which its agents would take for dead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvd_lb.report.run_directory import RunDirectory, replace_text, strict_json

_TABLE_SECONDS = 2.0


class Record:
    """The files of one job."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._written = 0.0

    def ending(self, **entry: Any) -> None:
        """A line of endings.jsonl; see `launch.failure` for what is in it."""
        line = json.dumps({"time": time.time(), **entry}) + "\n"
        self._thread.submit(_append, self._run.endings, line)

    def table(self, content: Mapping[str, Any], *, now: bool = False) -> bool:
        """Replace ranks.json; whether that was done, as it is not at once after the last time."""
        if not now and time.monotonic() < self._written + _TABLE_SECONDS:
            return False
        self._written = time.monotonic()
        self._thread.submit(_replace, self._run.ranks, strict_json({"time": time.time(), **content}))
        return True

    def close(self) -> None:
        """Once all is written."""
        self._thread.shutdown()


def _append(path: Path, line: str) -> None:
    with suppress(OSError), path.open("ab", buffering=0) as file:  # a full disk
        text, begin = line.encode(), file.tell()
        if file.write(text) < len(text):  # the next one is to begin a line
            file.truncate(begin)


def _replace(path: Path, text: str) -> None:
    with suppress(OSError):
        replace_text(path, text, sync=False)
