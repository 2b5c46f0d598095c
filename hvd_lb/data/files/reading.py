"""Reading that outlasts the hiccups of a file system: a server that restarts need not end a run of days.

Only the file system is asked again. What was read and is broken stays broken.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np

from hvd_lb.data.files import opening
from hvd_lb.errors import HostError

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
    """What `read` returns, tried again after an error of the file system; HostError after the last try."""
    waits = iter(RETRY_AFTER_SECONDS)
    while True:
        try:
            return read()
        except OSError as error:
            if not file_error(error):
                raise
            if error.errno in _PERMANENT:
                raise HostError(f"{path}: cannot be read ({error.strerror})") from error
            seconds = next(waits, None)
            if seconds is None:
                tries = len(RETRY_AFTER_SECONDS) + 1
                raise HostError(
                    f"{path}: cannot be read ({error.strerror}, {tries} times); was it moved while in use?"
                ) from error
            time.sleep(seconds)


def file_error(error: Exception) -> bool:
    """Whether the file system raised it. PIL's own errors are OSErrors too, but have no number."""
    return isinstance(error, OSError) and error.errno is not None


@contextmanager
def opened(path: str) -> Iterator[tuple[int, int]]:
    """A descriptor of a file and its bytes. OSError; UserError for what is no file: a pipe would be waited for."""
    descriptor = opening.open_file(path)
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def read_file(path: str) -> np.ndarray:
    """uint8 (bytes,): all of a file. HostError when it cannot be read after some tries."""
    return retried(partial(opening.read_file, path), path)
