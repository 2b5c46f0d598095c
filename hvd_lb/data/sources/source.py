"""Where the images of a split come from: what every source offers, and one look at its files.

Listing looks at names, sizes and times only.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from stat import S_ISDIR
from typing import Protocol

import numpy as np

from hvd_lb.data.files.journal import Journal
from hvd_lb.data.files.rows import Table
from hvd_lb.data.images import Progress
from hvd_lb.data.remote import store
from hvd_lb.data.remote.address import Address, Place

FileState = tuple[str, int, int]
"""A file or folder relative to the root, its time of change (ns; 0: not settled) and size (bytes; -1 for a folder, -2
for what is not there). Of an object at a server the tag stands for the time."""

_ABSENT = (1, -2)
_UNSETTLED_NS = 2_000_000_000
_STATE = struct.Struct("<qqq")


@dataclass(frozen=True)
class Listing:
    """One look at a source. `stamp` changes with the name, size or time of any file.

    `watched` are fewer than the files: whoever adds, removes or renames a file changes one of them. `build` goes on
    where the journal of a listing with the same stamp ends. `remarks` are those that may change without the stamp.
    """

    stamp: str
    watched: list[FileState]
    build: Callable[[Progress, Journal], Table]
    remarks: list[str] | None = None


class Source(Protocol):
    """Where the images of one split come from."""

    @property
    def root(self) -> Place:
        """Paths in the index are relative to it."""

    @property
    def home(self) -> Place:
        """The folder beside whose contents an index can lie, where that is on a file system."""

    @property
    def name(self) -> str:
        """What it is called in `home`; no other source there has the same."""

    @property
    def cheap(self) -> int:
        """An index of so many images is compared with all files at each opening, not only with what is watched."""

    def listing(self) -> Listing:
        """UserError for what can be seen to be wrong without opening an image."""

    def fits(self, classes: list[str], shards: list[str]) -> bool:
        """Whether an index with these can be of this source, by what is known without a look at a file."""

    def with_classes(self, classes: list[str]) -> Source:
        """The same, with the classes of the training split."""


def file_state(root: Place, relative: str) -> FileState:
    """As it is now, also where it is not there. OSError; of objects UserError, Missing for one that is not there."""
    if isinstance(root, Address):
        found = store.state(root / relative)
        return relative, found.tag, found.size
    try:
        stat = os.stat(os.path.join(root, relative))
    except FileNotFoundError:
        return relative, *_ABSENT
    # What has changed just now may change again without getting another time: it counts as changed next time.
    settled = abs(time.time_ns() - stat.st_mtime_ns) > _UNSETTLED_NS
    return relative, stat.st_mtime_ns if settled else 0, -1 if S_ISDIR(stat.st_mode) else stat.st_size


def state_of(stat: os.stat_result) -> tuple[int, int, int]:
    """Size and time of a file, and when the system last touched it. The last belongs into a stamp where files are few
    and soon read anew: what overwrites a file can keep its size and set its time, as `cp -p` and `rsync -t` do.
    """
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class States:
    """A digest of the `state_of` files, in their order, with and without when the system last touched them."""

    def __init__(self) -> None:
        self._all, self._lasting = hashlib.sha256(), hashlib.sha256()

    def add(self, state: tuple[int, int, int]) -> None:
        self._all.update(_STATE.pack(*state))
        self._lasting.update(_STATE.pack(*state[:2], 0))

    def digest(self, few: bool) -> bytes:
        return (self._all if few else self._lasting).digest()


def stamped(parts: Iterable[str | bytes | bytearray | np.ndarray]) -> str:
    """32 hexadecimal digits that change with any of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = memoryview(
            os.fsencode(part)
            if isinstance(part, str)
            else part.data
            if isinstance(part, np.ndarray)
            else part
        )
        digest.update(b"%d\0" % encoded.nbytes)
        digest.update(encoded)
        digest.update(b"\0")
    return digest.hexdigest()[:32]
