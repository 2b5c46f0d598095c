"""The logs of a run: which files there are, their last lines, and what comes to them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.errors import UserError
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.report.text import printable

_BLOCK = 1 << 16
#: More of one file is not read for its last lines.
_MOST = 1 << 26


@dataclass(frozen=True)
class LogFile:
    """One log; `label` says whose."""

    label: str
    path: Path


def log_folder(run: RunDirectory, attempt: int | None) -> Path:
    """Where the logs of this start are, or of an earlier one, the first being 1. UserError for one there is not."""
    if attempt is None:
        return run.logs
    folder = run.logs / f"attempt-{attempt}"
    if not folder.is_dir():
        names = (path.name.removeprefix("attempt-") for path in run.logs.glob("attempt-*"))
        there = sorted(int(name) for name in names if name.isdecimal())
        which = (
            f"those of attempts {there[0]} to {there[-1]} are there"
            if there
            else "it has the present logs only"
        )
        raise UserError(f"{printable(str(run.path))} has no logs of attempt {attempt}: {which}")
    return folder


def find_logs(folder: Path, rank: str | None) -> list[LogFile]:
    """Those of the launching process, its launcher and rank 0, of one rank ("3"), or of all ("all").

    UserError where that rank has none.
    """
    ranks = {
        number: path for path in sorted(folder.glob("rank-*.log")) if (number := _rank(path)) is not None
    }
    of_ranks = {number: LogFile(f"rank {number}", path) for number, path in sorted(ranks.items())}
    if rank not in (None, "all"):
        if int(rank) not in of_ranks:
            there = (
                f"there are those of ranks 0 to {max(of_ranks)}" if of_ranks else "no rank has started yet"
            )
            raise UserError(f"{printable(str(folder))} has no log of rank {rank}: {there}")
        return [of_ranks[int(rank)]]
    others = [path for path in folder.glob("*.log") if _rank(path) is None]
    others.sort(key=lambda path: (path.name != "launching.log", path.name))
    shown = of_ranks.values() if rank == "all" else [log for number, log in of_ranks.items() if number == 0]
    return [*(LogFile(path.stem, path) for path in others), *shown]


def _rank(path: Path) -> int | None:
    """rank-0003-h2.log is that of rank 3."""
    match = re.match(r"rank-(\d+)-", path.name, re.ASCII)
    return int(match[1]) if match else None


class LogReader:
    """Reads a log that grows: `lines` gives its new whole lines. It begins with the last `last` of those there are."""

    def __init__(self, path: Path, last: int):
        self._path = path
        self._position, self._file = _begin_of_last(path, last), _identity(path)
        self._part = b""

    def lines(self) -> list[str]:
        """None while it cannot be read. A file that was replaced, as by a new start, is read from its beginning."""
        try:
            with self._path.open("rb") as stream:
                identity = _identity_of(os.fstat(stream.fileno()))
                if identity != self._file or os.fstat(stream.fileno()).st_size < self._position:
                    self._file, self._position, self._part = identity, 0, b""
                stream.seek(self._position)
                text = self._part + stream.read(_MOST)
                self._position = stream.tell()
        except OSError:
            return []
        *whole, self._part = text.split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]

    def rest(self) -> list[str]:
        """A last line that has no end."""
        part, self._part = self._part, b""
        return [part.decode("utf-8", "replace")] if part else []


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return _identity_of(path.stat())
    except OSError:
        return None


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _begin_of_last(path: Path, lines: int) -> int:
    """Where the last lines of a file begin, found from its end."""
    try:
        with path.open("rb") as stream:
            position = end = stream.seek(0, os.SEEK_END)
            if not lines:
                return end
            wanted = lines + 1  # the line feed before them
            while position > max(0, end - _MOST):
                size = min(_BLOCK, position)
                position -= size
                stream.seek(position)
                block = stream.read(size)
                if position + size == end and not block.endswith(b"\n"):
                    wanted -= 1  # the last line has no end
                feeds = block.count(b"\n")
                if feeds >= wanted:
                    at = len(block)
                    for _ in range(wanted):
                        at = block.rindex(b"\n", 0, at)
                    return position + at + 1
                wanted -= feeds
            return position
    except OSError:
        return 0
