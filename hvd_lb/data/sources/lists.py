"""A list of images, CSV or TSV: one record an image, its path relative to the list and its label."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from stat import S_ISREG

import numpy as np

from hvd_lb.data.files.kinds import EXTENSIONS, is_ignored, why_not_read
from hvd_lb.data.files.rows import Names, measure_files
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.sources.labels import CLASSES_FILES, Classes, UnknownLabel, classes_in, find_classes
from hvd_lb.data.sources.names import look_alike, some
from hvd_lb.data.sources.source import Listing, States, file_state, stamped, state_of
from hvd_lb.data.sources.splits import split_of
from hvd_lb.errors import UserError

SUFFIXES = {".csv": ",", ".tsv": "\t"}
_PATHS = ("path", "file", "filename", "file_name", "image")
_LABELS = ("label", "class", "target")
_SOLUTION = [
    "imageid",
    "predictionstring",
]  # of Kaggle's ImageNet: n01440764 1 2 3 4, the class and its boxes


@dataclass(frozen=True)
class Entry:
    """One record of a list and the line it begins on, from 1."""

    path: str
    label: str
    line: int


@dataclass(frozen=True)
class ListSource:
    """The images of a list, by their paths relative to the folder `images`, else to that of the list.

    `classes` are those of the training split, and `training` is that split's list or folder, where this is the other
    one; `validation` is the folder of that where this is the training split.
    """

    path: Path
    classes: Classes | None = None
    cheap: int = 20_000
    images: Path | None = None
    training: ListSource | Path | None = None
    validation: Path | None = None

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

    def fits(self, classes: list[str], shards: list[str]) -> bool:
        return self.classes is None or self.classes.names == classes

    def listing(self) -> Listing:
        try:
            lists = [of.path for of in (self, self.training) if isinstance(of, ListSource)]
            own = [file_state(self.root, os.path.relpath(path, self.root)) for path in lists]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        entries = _Entries.of(read_list(self.path))
        names = entries.names
        self._refuse_part(names)
        classes, labels = self._numbered(entries)
        remarks = self._remarks(entries)
        states = States()
        for state in in_threads(partial(self._state, entries), range(len(names))):
            states.add(state)
        folders = sorted({os.path.dirname(os.fsdecode(name)) or "." for name in names})
        watched = [*own, *(file_state(self.root, other) for other in (*folders, *CLASSES_FILES))]
        known = states.digest(len(names) <= self.cheap)
        stamp = stamped([*classes, "", *remarks, names.content, names.ends, labels, known])
        return Listing(
            stamp,
            watched,
            lambda report, journal: replace(
                measure_files(self.root, classes, names, labels, report, journal), remarks=remarks
            ),
        )

    def _refuse_part(self, names: Names) -> None:
        """UserError where the list is for a folder of images and does not name all of them: it may be cut short."""
        if self.images is None:
            return
        there = {os.fsencode(entry.name) for entry in os.scandir(self.images) if _is_image(entry.name)}
        if unnamed := sorted(map(os.fsdecode, there.difference(names))):
            raise UserError(
                f"{self.path}: does not name {len(unnamed):,} of the {len(there):,} images in {self.images} "
                f"({some(unnamed)}); is it whole? Copy it again, or move these away"
            )

    def _remarks(self, entries: _Entries) -> list[str]:
        """UserError for a file that is named with two labels."""
        repeated = 0
        for first, again in entries.repeated(self.root):
            one, other = entries[first], entries[again]
            if one.label != other.label:
                raise UserError(
                    f"{self.path}, line {other.line}: {other.path!r} is {other.label!r}, but {one.label!r} "
                    f"in line {one.line}; leave one out"
                )
            repeated += 1
        remarks = []
        if repeated:
            remarks.append(
                f"{self.path.name}: lines that repeat others, whose images count again: {repeated:,}"
            )
        for split, what in ((self.training, "trained on"), (self.validation, "validated with")):
            if split and (shared := self._shared(entries, split)):
                where = split if isinstance(split, Path) else split.path
                remarks.append(
                    f"{self.path.name}: {shared:,} of its {len(entries.names):,} images are {what}, too "
                    f"({where.name}): accuracy will look better than it is"
                )
        return remarks

    def _shared(self, entries: _Entries, other: ListSource | Path) -> int:
        """How many of the images are of the other split, too."""
        if isinstance(other, ListSource):
            there = _Entries.of(read_list(other.path)).hashes(other.root)
            return int(np.isin(entries.hashes(self.root), there).sum())
        here, folder = (Path(os.path.realpath(of)) for of in (self.root, other))
        return sum(_whole(here, name).startswith(os.fsencode(f"{folder}/")) for name in entries.names)

    def _numbered(self, entries: _Entries) -> tuple[list[str], np.ndarray]:
        """Classes, and labels int64 (N,)."""
        distinct = entries.distinct
        try:
            classes = classes_in(self.root, self.classes) or find_classes(distinct)
            numbers = classes.numbers(distinct)
        except UnknownLabel as error:
            line = int(entries.lines[np.argmax(entries.codes == distinct.index(error.label))])
            raise UserError(f"{self.path}, line {line}: {error}") from error
        return classes.names, numbers.astype(np.int64)[entries.codes]

    def _state(self, entries: _Entries, position: int) -> tuple[int, int, int]:
        """Of a file."""
        path = os.fsdecode(entries.names[position])
        where = f"{self.path}, line {entries.lines[position]}: {path!r}"
        try:
            stat = os.stat(os.path.join(self.root, path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{where} cannot be read ({reason}){self._hint(path)}") from error
        if not S_ISREG(stat.st_mode):
            raise UserError(f"{where} is no file")
        return state_of(stat)

    def _hint(self, path: str) -> str:
        """ "; …": why a file may not be where it is said to be."""
        folder, name = os.path.split(os.path.join(self.root, path))
        if "\\" in path:
            return "; expected / between folders"
        if path != path.strip():
            return "; the name has a space at its end"
        return look_alike(name, os.listdir(folder)) if os.path.isdir(folder) else ""


class _Entries:
    """All records of a list, as arrays: `codes`, int32 (N,), are positions in `distinct`, the labels."""

    def __init__(self, names: Names, distinct: list[str], codes: np.ndarray, lines: np.ndarray) -> None:
        self.names, self.distinct, self.codes, self.lines = names, distinct, codes, lines

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> _Entries:
        codes, lines, known = array("i"), array("i"), dict[str, int]()

        def names() -> Iterator[bytes]:
            for entry in entries:
                codes.append(known.setdefault(entry.label, len(known)))
                lines.append(entry.line)
                yield os.fsencode(entry.path)

        found = Names.of(names())
        return cls(found, list(known), np.frombuffer(codes, np.int32), np.frombuffer(lines, np.int32))

    def __getitem__(self, position: int) -> Entry:
        label = self.distinct[self.codes[position]]
        return Entry(os.fsdecode(self.names[position]), label, int(self.lines[position]))

    def repeated(self, root: Path) -> Iterator[tuple[int, int]]:
        """Positions of the same file, however its path is written: its first, and one after that, in the order of
        these.
        """
        hashes = self.hashes(root)
        ordered = np.sort(hashes)
        doubled = ordered[1:][ordered[1:] == ordered[:-1]]
        suspects = np.flatnonzero(np.isin(hashes, doubled)) if len(doubled) else doubled
        first: dict[bytes, int] = {}
        for position in suspects.tolist():
            before = first.setdefault(_whole(root, self.names[position]), position)
            if before != position:
                yield before, position

    def hashes(self, root: Path) -> np.ndarray:
        """int64 (N,), of this process: the same for the same file, however its path is written."""
        above = Path(os.path.abspath(root))
        return np.fromiter((hash(_whole(above, name)) for name in self.names), np.int64, len(self.names))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not is_ignored(name)


def _whole(root: Path, name: bytes) -> bytes:
    return os.path.normpath(os.path.join(os.fsencode(os.path.abspath(root)), name))


def read_list(path: Path) -> Iterator[Entry]:
    """The records of a list, by its suffix with commas or tabs, with or without a header. UserError names the line."""
    delimiter = SUFFIXES[path.suffix.lower()]
    try:
        # Paths need not be text: what is not keeps its bytes.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            records = csv.reader(_text(path, file), delimiter=delimiter, skipinitialspace=True, strict=True)
            columns, line, solution, header = None, 1, False, list[str]()
            splits: dict[int, set[str]] = {}
            while True:
                try:
                    record = next(records)
                except StopIteration:
                    _refuse_splits(path, header, splits)
                    return
                except csv.Error as error:
                    why = "a quote is not closed" if "unexpected end" in str(error) else error
                    raise UserError(f"{path}, line {line}: {why}") from error
                at, line = line, records.line_num + 1
                if not any(field.strip() for field in record):
                    continue
                if columns is None:
                    solution = [name.strip().lower() for name in record] == _SOLUTION
                    columns = (0, 1) if solution else _header(path, record)
                    if columns is not None:
                        width, header = len(record), record
                        splits = {at: set() for at in range(width) if at not in columns}
                        continue
                    columns, width = (0, 1), 2
                if solution and len(record) == width:
                    record = [f"{record[0]}.JPEG", record[1].partition(" ")[0]]
                entry = _entry(path, record, columns, width, at)
                for column in list(splits):
                    if split_of(value := record[column].strip()):
                        splits[column].add(value)
                    else:
                        del splits[column]
                yield entry
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _refuse_splits(path: Path, header: Sequence[str], splits: Mapping[int, set[str]]) -> None:
    """UserError where a column says of each record to which of several splits it belongs; by column what it says."""
    for column, values in splits.items():
        if len({split_of(value) for value in values}) > 1:
            raise UserError(
                f"{path}: has images of several splits ({some(sorted(values))}), by its column "
                f"{header[column].strip()!r}, which is not read: write a list for each, such as train.csv and val.csv"
            )


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
    found = [[at for at, name in enumerate(names) if name in of] for of in (_PATHS, _LABELS)]
    if all(found):
        for columns, what in zip(found, ("paths", "labels"), strict=True):
            if len(columns) > 1:
                given = " and ".join(record[at].strip() for at in columns)
                raise UserError(
                    f"{path}, line 1: {given} are columns of {what}: rename or remove all but one"
                )
        return found[0][0], found[1][0]
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
        reason = why_not_read(entry.path)
        raise UserError(f"{where}: {entry.path!r}: {reason} ({' '.join(EXTENSIONS)})")
    return entry
