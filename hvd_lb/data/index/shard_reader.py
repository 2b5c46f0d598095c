"""Images out of tar shards by offset: exactly their bytes, with files kept open, by any number of threads."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np

from hvd_lb.data.files.opening import open_file, read_range
from hvd_lb.data.files.reading import retried

_READERS = 2  # of the training and the validation images
_OTHERS = (
    256  # files for everything else in the process: libraries, sockets to other ranks, logs, checkpoints
)
_FEWEST = 16


class ShardReader:
    """Tar files by their names relative to `root`, of which at most `most_open` are kept open until it is dropped.

    By default that is all of them, as far as the system's limit goes, which is raised where it has to be.
    """

    def __init__(self, root: Path, names: Sequence[str], most_open: int | None = None) -> None:
        self._root = root
        self._names = names
        self._most_open = most_open or _most_open(len(names))
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = Lock()

    def read(self, shard: int, offset: int, size: int) -> np.ndarray:
        """uint8 (size,), or fewer where the shard ends. UserError when it cannot be read after some tries."""
        path = os.path.join(self._root, self._names[shard])
        return retried(lambda: self._read(path, shard, offset, size), path)

    def _read(self, path: str, shard: int, offset: int, size: int) -> np.ndarray:
        file = self._descriptor(path, shard)
        try:
            return read_range(file.number, offset, size)
        except OSError:
            with self._lock:  # a stale handle would stay stale
                self._open.pop(shard, None)
            raise

    def _descriptor(self, path: str, shard: int) -> _Descriptor:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = self._opened(path)  # outside the lock: a slow file system need not hold up the others
        with self._lock:
            kept = self._open.setdefault(shard, opened)
            self._open.move_to_end(shard)
            while len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return kept

    def _opened(self, path: str) -> _Descriptor:
        """Closes half of the files and keeps no more from then on, where the process or the machine has too many."""
        while True:
            try:
                return _Descriptor(path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                with self._lock:
                    if not self._open:
                        raise
                    half = len(self._open) // 2
                    self._most_open = max(1, half)
                    while len(self._open) > half:
                        self._open.popitem(last=False)


def _most_open(shards: int) -> int:
    """How many shards a reader may keep open; the limit of open files is raised for them, where it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return shards
    wanted = _READERS * shards
    if wanted + _OTHERS > soft:
        raised = soft + wanted if hard == resource.RLIM_INFINITY else min(soft + wanted, hard)
        with suppress(ValueError, OSError):  # the kernel's own limit may be below
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return max(_FEWEST, (soft - _OTHERS) // _READERS)


class _Descriptor:
    """Closed with its last user: a thread may still read from a file that is no longer kept open."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = open_file(path)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
