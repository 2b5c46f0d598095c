"""Reading that outlasts the hiccups of a file system: a server that restarts need not end a run of days.

Only the file system is asked again. What was read and is broken stays broken.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from stat import S_ISDIR, S_ISREG
from typing import TypeVar

import numpy as np

from hvd_lb.errors import UserError

T = TypeVar("T")

RETRY_AFTER_SECONDS = (0.2, 0.8, 3.0, 6.0)
"""How long is waited before each further try."""

_PERMANENT = {
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
}


def retried(read: Callable[[], T], path: str) -> T:
    """What `read` returns, tried again after an error of the file system; UserError after the last try."""
    waits = iter(RETRY_AFTER_SECONDS)
    while True:
        try:
            return read()
        except OSError as error:
            if not file_error(error):
                raise
            if error.errno in _PERMANENT:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error
            seconds = next(waits, None)
            if seconds is None:
                tries = len(RETRY_AFTER_SECONDS) + 1
                raise UserError(
                    f"{path}: cannot be read ({error.strerror}, {tries} times); was it moved while in use?"
                ) from error
            time.sleep(seconds)


def file_error(error: Exception) -> bool:
    """Whether the file system raised it. PIL's own errors are OSErrors too, but have no number."""
    return isinstance(error, OSError) and error.errno is not None


@contextmanager
def opened(path: str) -> Iterator[tuple[int, int]]:
    """A descriptor of a file and its bytes. OSError; UserError for what is no file: a pipe would be waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        stat = os.fstat(descriptor)
        if not S_ISREG(stat.st_mode):
            kind = "a folder" if S_ISDIR(stat.st_mode) else "a pipe or a device"
            raise UserError(f"{path}: is {kind}, not a file; move it out of the data")
        yield descriptor, stat.st_size
    finally:
        os.close(descriptor)


def read_file(path: str) -> np.ndarray:
    """uint8 (bytes,): all of a file. UserError when it cannot be read after some tries."""

    def read() -> np.ndarray:
        with opened(path) as (descriptor, size):
            content = np.empty(size, np.uint8)
            return content[: read_into(descriptor, content, 0)]

    return retried(read, path)


def read_into(descriptor: int, content: np.ndarray, offset: int) -> int:
    """Fill `content`, uint8 (n,), from `offset` on; how many bytes there were. OSError."""
    rest = content.data
    while rest:
        count = os.preadv(descriptor, [rest], offset + len(content) - len(rest))
        if not count:
            break
        rest = rest[count:]
    return len(content) - len(rest)
