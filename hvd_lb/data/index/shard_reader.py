"""Images out of tar shards by offset: exactly their bytes, with few open files, by any number of threads."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np

from hvd_lb.data.files.reading import retried

MOST_OPEN = 64


class ShardReader:
    """Tar files by their names relative to `root`, of which at most `most_open` are kept open."""

    def __init__(self, root: Path, names: Sequence[str], most_open: int = MOST_OPEN) -> None:
        self._root = root
        self._names = names
        self._most_open = most_open
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = Lock()

    def read(self, shard: int, offset: int, size: int) -> np.ndarray:
        """uint8 (size,), or fewer where the shard ends. UserError when it cannot be read after some tries."""
        path = os.path.join(self._root, self._names[shard])
        return retried(lambda: self._read(path, shard, offset, size), path)

    def _read(self, path: str, shard: int, offset: int, size: int) -> np.ndarray:
        file = self._descriptor(path, shard)
        content = np.empty(size, np.uint8)
        rest = content.data
        try:
            while rest:
                count = os.preadv(file.number, [rest], offset + size - len(rest))
                if not count:
                    return content[: size - len(rest)]
                rest = rest[count:]
        except OSError:
            with self._lock:  # a stale handle would stay stale
                self._open.pop(shard, None)
            raise
        return content

    def _descriptor(self, path: str, shard: int) -> _Descriptor:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = _Descriptor(path)  # outside the lock: a slow file system need not hold up the others
        with self._lock:
            kept = self._open.setdefault(shard, opened)
            self._open.move_to_end(shard)
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return kept


class _Descriptor:
    """Closed with its last user: a thread may still read from a file that is no longer kept open."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
