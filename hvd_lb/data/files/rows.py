"""The rows of an index: what is known of each image, and how files' headers become rows.

A row is one record of 48 bytes, so that whoever uses an image touches one page of memory, not one for each column.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hvd_lb.data.files.header import NO_HEADER, Header, header_or_reason
from hvd_lb.data.files.opening import open_file
from hvd_lb.data.files.reading import retried
from hvd_lb.data.files.section import Section
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.images import Progress

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
        ("kind", "u1"),  # of `hvd_lb.data.files.header.KINDS`
    ]
)

_CHUNK = 256


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
    measured = rows[["size", "width", "height", "orientation", "kind"]]  # a view
    broken: dict[int, str] = {}

    def measure(start: int) -> int:
        stop = min(start + _CHUNK, len(names))
        for position in range(start, stop):
            path = os.path.join(root, os.fsdecode(names[position]))
            size, header = retried(partial(_header, path), path)
            if isinstance(header, str):
                broken[position], header = header, NO_HEADER
            measured[position] = (size, *header)
        return stop

    for stop in in_threads(measure, range(0, len(names), _CHUNK)):
        report(f"reading image sizes in {root.name}", stop, len(names))
    return Table(
        classes, rows, np.frombuffer(b"".join(names), np.uint8), [], min(broken.items(), default=None)
    )


def _header(path: str) -> tuple[int, Header | str]:
    """Bytes of a file, and its header or what is wrong with that."""
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        return size, header_or_reason(Section.of_file(descriptor, 0, size))
    finally:
        os.close(descriptor)
