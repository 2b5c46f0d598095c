"""A list of images, CSV or TSV: one record an image, its path relative to the list and its label."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG

import numpy as np

from hvd_lb.data.files.kinds import EXTENSIONS, GIF
from hvd_lb.data.files.rows import measure_files
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.sources.labels import Classes, UnknownLabel, find_classes, read_classes
from hvd_lb.data.sources.source import Listing, file_state, stamped
from hvd_lb.errors import UserError

SUFFIXES = {".csv": ",", ".tsv": "\t"}
_PATHS = ("path", "file", "filename", "file_name", "image")
_LABELS = ("label", "class", "target")
_CHUNK = 256


@dataclass(frozen=True)
class Entry:
    """One record of a list and the line it begins on, from 1."""

    path: str
    label: str
    line: int


@dataclass(frozen=True)
class ListSource:
    """The images of a list; `classes` are those of the training split where this is the other one."""

    path: Path
    classes: Classes | None = None
    cheap: int = 20_000

    @property
    def root(self) -> Path:
        return self.path.parent

    @property
    def home(self) -> Path:
        return self.path.parent

    @property
    def name(self) -> str:
        return self.path.name

    def with_classes(self, classes: list[str]) -> ListSource:
        return replace(self, classes=Classes(classes, from_file=False))

    def listing(self) -> Listing:
        try:
            own = file_state(self.root, self.path.name)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        entries = list(read_list(self.path))
        classes, labels = self._numbered(entries)
        names = [os.fsencode(entry.path) for entry in entries]
        chunks = [entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK)]
        stats = [stat for found in in_threads(self._stats, chunks) for stat in found]
        folders = sorted({os.path.dirname(entry.path) or "." for entry in entries})
        watched = [own, *(file_state(self.root, folder) for folder in folders)]
        each = zip(names, labels.tolist(), stats, strict=True)
        stamp = stamped([*classes, "", *(b"%s\0%d\0%s" % of for of in each)])
        return Listing(
            stamp,
            watched,
            lambda report, journal: measure_files(self.root, classes, names, labels, report, journal),
        )

    def _numbered(self, entries: Sequence[Entry]) -> tuple[list[str], np.ndarray]:
        """Classes, and labels int64 (N,)."""
        first_lines: dict[str, int] = {}
        for entry in entries:
            first_lines.setdefault(entry.label, entry.line)
        distinct = list(first_lines)
        try:
            classes = read_classes(self.root) or self.classes or find_classes(distinct)
            numbers = dict(zip(distinct, classes.numbers(distinct).tolist(), strict=True))
        except UnknownLabel as error:
            raise UserError(f"{self.path}, line {first_lines[error.label]}: {error}") from error
        return classes.names, np.array([numbers[entry.label] for entry in entries], np.int64)

    def _stats(self, entries: Sequence[Entry]) -> list[bytes]:
        """Size and time of the files, for the stamp."""
        stats = []
        for entry in entries:
            try:
                stat = os.stat(os.path.join(self.root, entry.path))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"{self.path}, line {entry.line}: {entry.path!r} cannot be read ({reason})"
                ) from error
            if not S_ISREG(stat.st_mode):
                raise UserError(f"{self.path}, line {entry.line}: {entry.path!r} is no file")
            stats.append(b"%d\0%d" % (stat.st_size, stat.st_mtime_ns))
        return stats


def read_list(path: Path) -> Iterator[Entry]:
    """The records of a list, by its suffix with commas or tabs, with or without a header. UserError names the line."""
    delimiter = SUFFIXES[path.suffix.lower()]
    try:
        # Paths need not be text: what is not keeps its bytes.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            records = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            columns, line = None, 1
            while True:
                try:
                    record = next(records)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise UserError(f"{path}, line {line}: {error}") from error
                at, line = line, records.line_num + 1
                if not any(record):
                    continue
                if columns is None:
                    columns = _header(path, record)
                    if columns is not None:
                        width = len(record)
                        continue
                    columns, width = (0, 1), 2
                yield _entry(path, record, columns, width, at)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _header(path: Path, record: list[str]) -> tuple[int, int] | None:
    """Which columns hold path and label; None for a record that is no header."""
    names = [name.strip().lower() for name in record]
    found = [next((names.index(name) for name in of if name in names), None) for of in (_PATHS, _LABELS)]
    if found[0] is not None and found[1] is not None:
        return found[0], found[1]
    if len(record) != 2 or not record[0].lower().endswith(EXTENSIONS):
        given = ", ".join(record)
        raise UserError(
            f"{path}, line 1: expected `path{SUFFIXES[path.suffix.lower()]}label`, not {given[:80]!r}"
        )
    return None


def _entry(path: Path, record: list[str], columns: tuple[int, int], width: int, line: int) -> Entry:
    where = f"{path}, line {line}"
    if len(record) != width:
        raise UserError(
            f"{where}: {len(record)} columns, expected {width}; quote names with commas or line breaks"
        )
    entry = Entry(record[columns[0]], record[columns[1]].strip(), line)
    if not entry.path or not entry.label:
        raise UserError(f"{where}: no {'label' if entry.path else 'path'}")
    if not entry.path.lower().endswith(EXTENSIONS):
        reason = GIF if entry.path.lower().endswith(".gif") else "no image file"
        raise UserError(f"{where}: {entry.path!r}: {reason} ({' '.join(EXTENSIONS)})")
    return entry
