"""A list of images, CSV or TSV: one record an image, its path relative to the list and its label."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG

import numpy as np

from hvd_lb.data.files.kinds import EXTENSIONS, GIF
from hvd_lb.data.files.rows import measure_files
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.sources.labels import Classes, UnknownLabel, find_classes, read_classes
from hvd_lb.data.sources.names import look_alike
from hvd_lb.data.sources.source import Listing, file_state, stamped, state_of
from hvd_lb.errors import UserError

SUFFIXES = {".csv": ",", ".tsv": "\t"}
_PATHS = ("path", "file", "filename", "file_name", "image")
_LABELS = ("label", "class", "target")
_SOLUTION = [
    "imageid",
    "predictionstring",
]  # of Kaggle's ImageNet: n01440764 1 2 3 4, the class and its boxes
_CHUNK = 256


@dataclass(frozen=True)
class Entry:
    """One record of a list and the line it begins on, from 1."""

    path: str
    label: str
    line: int


@dataclass(frozen=True)
class ListSource:
    """The images of a list, by their paths relative to the folder `images`, else to that of the list.

    `classes` are those of the training split where this is the other one.
    """

    path: Path
    classes: Classes | None = None
    cheap: int = 20_000
    images: Path | None = None

    @property
    def root(self) -> Path:
        return self.images or self.path.parent

    @property
    def home(self) -> Path:
        return self.root.parent if self.images else self.root

    @property
    def name(self) -> str:
        return self.path.name

    def with_classes(self, classes: list[str]) -> ListSource:
        return replace(self, classes=Classes(classes, from_file=False))

    def listing(self) -> Listing:
        try:
            own = file_state(self.root, os.path.relpath(self.path, self.root))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        entries = list(read_list(self.path))
        classes, labels = self._numbered(entries)
        remarks = self._remarks(entries)
        names = [os.fsencode(entry.path) for entry in entries]
        chunks = [entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK)]
        few = len(entries) <= self.cheap
        states = [np.array(found, np.int64) for found in in_threads(self._states, chunks)]
        folders = sorted({os.path.dirname(entry.path) or "." for entry in entries})
        watched = [own, *(file_state(self.root, folder) for folder in folders)]
        known = (state[:, : 3 if few else 2].tobytes() for state in states)
        stamp = stamped([*classes, "", *names, labels.tobytes(), *known])
        return Listing(
            stamp,
            watched,
            lambda report, journal: replace(
                measure_files(self.root, classes, names, labels, report, journal), remarks=remarks
            ),
        )

    def _remarks(self, entries: Sequence[Entry]) -> list[str]:
        """UserError for a file that is named with two labels."""
        first: dict[str, Entry] = {}
        repeated = 0
        for entry in entries:
            other = first.setdefault(os.path.normpath(entry.path), entry)
            if other.label != entry.label:
                raise UserError(
                    f"{self.path}, line {entry.line}: {entry.path!r} is {entry.label!r}, but {other.label!r} "
                    f"in line {other.line}; leave one out"
                )
            repeated += other is not entry
        if not repeated:
            return []
        return [f"{self.path.name}: lines that repeat others, whose images count again: {repeated:,}"]

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

    def _states(self, entries: Sequence[Entry]) -> list[tuple[int, int, int]]:
        """Of the files."""
        states = []
        for entry in entries:
            try:
                stat = os.stat(os.path.join(self.root, entry.path))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"{self.path}, line {entry.line}: {entry.path!r} cannot be read ({reason})"
                    f"{self._hint(entry.path)}"
                ) from error
            if not S_ISREG(stat.st_mode):
                raise UserError(f"{self.path}, line {entry.line}: {entry.path!r} is no file")
            states.append(state_of(stat))
        return states

    def _hint(self, path: str) -> str:
        """ "; …": why a file may not be where it is said to be."""
        folder, name = os.path.split(os.path.join(self.root, path))
        if "\\" in path:
            return "; expected / between folders"
        if path != path.strip():
            return "; the name has a space at its end"
        return look_alike(name, os.listdir(folder)) if os.path.isdir(folder) else ""


def read_list(path: Path) -> Iterator[Entry]:
    """The records of a list, by its suffix with commas or tabs, with or without a header. UserError names the line."""
    delimiter = SUFFIXES[path.suffix.lower()]
    try:
        # Paths need not be text: what is not keeps its bytes.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            records = csv.reader(_text(path, file), delimiter=delimiter, skipinitialspace=True, strict=True)
            columns, line, solution = None, 1, False
            while True:
                try:
                    record = next(records)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise UserError(f"{path}, line {line}: {error}") from error
                at, line = line, records.line_num + 1
                if not any(field.strip() for field in record):
                    continue
                if columns is None:
                    solution = [name.strip().lower() for name in record] == _SOLUTION
                    columns = (0, 1) if solution else _header(path, record)
                    if columns is not None:
                        width = len(record)
                        continue
                    columns, width = (0, 1), 2
                if solution and len(record) == width:
                    record = [f"{record[0]}.JPEG", record[1].partition(" ")[0]]
                yield _entry(path, record, columns, width, at)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _text(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise UserError(
                f"{path}: is no UTF-8 text (UTF-16, as Excel's Unicode text?); save it as CSV in UTF-8"
            )
        yield line


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
