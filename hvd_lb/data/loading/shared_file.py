"""A file of a given size that the processes of a host map together, in memory (/dev/shm, or without a name) or on disk.

Who maps one holds a shared lock on it, so what nobody has locked is a dead run's, and may be removed. One without a
name, which somebody holds for all of them, is `/proc/self/fd/NUMBER`, and is gone with the last who holds or maps it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from hvd_lb.errors import HostError
from hvd_lb.machine.limits import available_memory


class SharedFile:
    """`path`, made with `size` bytes of zeros if it is not there; `content` is uint8 (size,), mapped.

    HostError when there is no room for it: all of it is taken at once, as a write without room to a mapped file would
    kill the process. `unlink` removes the name; the memory stays until the last process that maps it has ended,
    however it ends.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open(path, size)
            self._mapping = mmap.mmap(self._descriptor, size)
        except OSError as error:
            raise HostError(f"{path}: cannot be used as a cache ({error.strerror})") from error
        self.content = np.frombuffer(self._mapping, np.uint8)

    def unlink(self) -> None:
        self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def discard_unused(folder: Path, pattern: str, but: Path | None = None) -> None:
    """Remove the shared files in `folder` that match `pattern` and that no process maps, except `but`."""
    with suppress(OSError):
        for path in folder.glob(pattern):
            if path != but:
                with suppress(OSError), path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def _open(path: Path, size: int) -> int:
    """A descriptor of the file with a shared lock on it; made and given its size by whoever is alone with it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_size != size:
                    _allocate(descriptor, path, size)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            there = os.fstat(descriptor)
            with suppress(FileNotFoundError):  # where somebody removed it, as nobody had locked it yet
                if there.st_size == size and os.path.samestat(os.stat(path), there):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _allocate(descriptor: int, path: Path, size: int) -> None:
    os.ftruncate(descriptor, 0)
    rooms = [] if _nameless(path) else [shutil.disk_usage(path.parent).free]
    if _nameless(path) or path.is_relative_to("/dev/shm"):
        rooms.append(available_memory())
    if size <= min(rooms):
        with suppress(OSError):
            os.posix_fallocate(descriptor, 0, size)
            return
    if not _nameless(path):
        path.unlink(missing_ok=True)
    raise HostError(
        f"{_where(path)}: the decoded images need {size:,} bytes and there are {min(rooms):,}; leave --cache out"
    )


def _nameless(path: Path) -> bool:
    return path.is_relative_to("/proc/self/fd")


def _where(path: Path) -> str:
    return "memory" if _nameless(path) else str(path.parent)
