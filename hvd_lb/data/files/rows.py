"""The rows of an index: what is known of each image, and how files' headers become rows.

A row is one record of 56 bytes, so that whoever uses an image touches one page of memory, not one for each column.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np

from hvd_lb.data.files.header import NO_HEADER, Header, header_or_reason
from hvd_lb.data.files.journal import Journal
from hvd_lb.data.files.reading import opened, retried
from hvd_lb.data.files.section import WINDOW, Section
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
        ("head", "<u8"),  # `head_sum` of its first bytes
    ]
)

_CHUNK = 256


class Names(Sequence[bytes]):
    """Many names in one piece, `content`; `ends` are int64 (N,). Objects would take five times as much memory."""

    def __init__(self, content: bytes | bytearray, ends: np.ndarray) -> None:
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        content, ends = bytearray(), array("q")
        for name in names:
            content += name
            ends.append(len(content))
        return cls(content, np.frombuffer(ends, np.int64))

    @classmethod
    def joined(cls, parts: Iterable[Names]) -> Names:
        content, ends = bytearray(), array("q")
        for part in parts:
            ends.frombytes((part.ends + len(content)).tobytes())
            content += part.content
        return cls(content, np.frombuffer(ends, np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """int64 (N,)."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, position: int) -> bytes: ...

    @overload
    def __getitem__(self, position: slice) -> Sequence[bytes]: ...

    def __getitem__(self, position: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(position, slice):
            return [self[one] for one in range(*position.indices(len(self)))]
        end = int(self.ends[position])
        before = position % len(self) - 1
        return bytes(self.content[int(self.ends[before]) if before >= 0 else 0 : end])


@dataclass(frozen=True)
class Table:
    """All of an index that has just been made: rows, names in one piece (uint8), and the first broken header."""

    classes: list[str]
    rows: np.ndarray
    names: np.ndarray
    shards: list[str]
    first_broken: tuple[int, str] | None
    remarks: list[str] = field(default_factory=list)  # what a user should know of how the images were found
    objects: list[tuple[int, int]] = field(default_factory=list)  # tag and bytes of each shard, at a server


def head_sum(content: bytes | memoryview) -> int:
    """A checksum of the first bytes of an image file, which are read for its header anyway: to see that it is another.

    Of files of the same length it is equal by chance for one of 2³² pairs.
    """
    return zlib.crc32(content[:WINDOW])


def measure_files(
    root: Path,
    classes: list[str],
    names: Names,
    labels: np.ndarray,
    report: Progress,
    journal: Journal,
) -> Table:
    """Rows of files by their names relative to `root`, those in the journal without a look at the file.

    UserError for one that the file system does not give.
    """
    rows = np.zeros(len(names), ROW)
    rows["label"], rows["shard"] = labels, -1
    rows["name_bytes"] = names.lengths
    rows["name_at"][1:] = names.ends[:-1]
    measured = rows[["size", "width", "height", "orientation", "kind", "head"]]  # a view
    broken: dict[int, str] = {}
    done = 0
    for start, block in journal.blocks():
        if start == done:
            found = np.frombuffer(block, measured.dtype)
            measured[done : done + len(found)] = found
            done += len(found)

    def measure(position: int) -> int:
        path = os.path.join(root, os.fsdecode(names[position]))
        size, header, head = retried(partial(_header, path), path)
        if isinstance(header, str):
            broken[position], header = header, NO_HEADER
        measured[position] = (size, *header, head)
        return position

    again = np.flatnonzero(
        rows["width"][:done] == 0
    ).tolist()  # the journal does not say why these are broken
    for position in in_threads(measure, chain(again, range(done, len(names)))):
        if position >= done and ((position + 1) % _CHUNK == 0 or position + 1 == len(names)):
            journal.append(done, measured[done : position + 1].tobytes())
            done = position + 1
            report(f"reading image sizes in {root.name}", done, len(names))
    return Table(classes, rows, np.frombuffer(names.content, np.uint8), [], min(broken.items(), default=None))


def _header(path: str) -> tuple[int, Header | str, int]:
    """Bytes of a file, its header or what is wrong with that, and `head_sum`."""
    with opened(path) as (descriptor, size):
        section = Section.of_file(descriptor, 0, size)
        head = head_sum(section.at(0, WINDOW))
        return size, header_or_reason(section), head
