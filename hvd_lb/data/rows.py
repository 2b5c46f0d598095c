"""The rows of an index: what is known of each image, and how files' headers become rows.

A row is one record of 48 bytes, so that whoever uses an image touches one page of memory, not one for each column.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from hvd_lb.data.header import BrokenHeader, read_header
from hvd_lb.data.images import Progress
from hvd_lb.data.reading import retried
from hvd_lb.data.section import Section

ROW = np.dtype(
    [
        ("label", "<i8"),
        ("size", "<i8"),  # bytes of the encoded image
        ("offset", "<i8"),  # of its first byte in the shard; 0 for a file of its own
        ("name_at", "<i8"),  # of its name in the index's names
        ("width", "<i4"),  # pixels as stored; 0 where the header is broken
        ("height", "<i4"),
        ("shard", "<i4"),  # position in the index's shards; -1 for a file of its own
        ("name_bytes", "<u2"),
        ("orientation", "u1"),  # EXIF, 1 to 8
        ("kind", "u1"),  # of `hvd_lb.data.header.KINDS`
    ]
)

S = TypeVar("S")
T = TypeVar("T")

_CHUNK = 256
THREADS = min(32, 4 * (os.cpu_count() or 1))
"""For reading headers: more than cores, as most of them wait for a file system."""


@dataclass(frozen=True)
class Table:
    """All of an index that has just been made: rows, names in one piece (uint8), and the first broken header."""

    classes: list[str]
    rows: np.ndarray
    names: np.ndarray
    shards: list[str]
    first_broken: tuple[int, str] | None


def measure_files(
    root: Path, classes: list[str], names: Sequence[bytes], labels: np.ndarray, report: Progress
) -> Table:
    """Rows of files by their names relative to `root`. UserError for one that the file system does not give."""
    rows = np.zeros(len(names), ROW)
    rows["label"], rows["shard"] = labels, -1
    rows["name_bytes"] = [len(name) for name in names]
    np.cumsum(rows["name_bytes"][:-1], dtype=np.int64, out=rows["name_at"][1:])
    broken: dict[int, str] = {}

    def measure(start: int) -> int:
        stop = min(start + _CHUNK, len(names))
        for position in range(start, stop):
            path = os.path.join(root, os.fsdecode(names[position]))
            try:
                _measure_file(path, rows[position])
            except BrokenHeader as error:
                broken[position] = str(error)
        return stop

    for stop in in_threads(measure, range(0, len(names), _CHUNK)):
        report(f"reading image sizes in {root.name}", stop, len(names))
    return Table(
        classes, rows, np.frombuffer(b"".join(names), np.uint8), [], min(broken.items(), default=None)
    )


def in_threads(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """What `work` makes of each item, in order."""
    with ThreadPoolExecutor(THREADS, "hvd-lb index") as pool:
        yield from pool.map(work, items)


def measure(section: Section, row: np.void) -> None:
    """Fill width, height, orientation and kind of one row. BrokenHeader."""
    header = read_header(section)
    row["width"], row["height"] = header.width, header.height
    row["orientation"], row["kind"] = header.orientation, header.kind


def _measure_file(path: str, row: np.void) -> None:
    def read() -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            row["size"] = size = os.fstat(descriptor).st_size
            row["orientation"] = 1
            measure(Section.of_file(descriptor, 0, size), row)
        finally:
            os.close(descriptor)

    retried(read, path)
