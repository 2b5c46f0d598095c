"""Reading that outlasts the hiccups of a file system: a server that restarts need not end a run of days.

Only the file system is asked again. What was read and is broken stays broken.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from hvd_lb.errors import UserError

T = TypeVar("T")

RETRY_AFTER_SECONDS = (0.2, 0.8, 3.0, 6.0)
"""How long is waited before each further try."""

_PERMANENT = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


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
