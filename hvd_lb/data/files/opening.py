"""Opening files to read: only regular ones, as a pipe or a socket with the name of an image would be waited for."""

from __future__ import annotations

import errno
import os
from stat import S_ISREG

import numpy as np

from hvd_lb.errors import UserError


def open_file(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file by. UserError at once where it is a pipe, a socket, a device or a folder."""
    try:
        # Without O_NONBLOCK a pipe would be opened when somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise _no_file(path) from error
        raise
    try:
        if not S_ISREG(os.fstat(descriptor).st_mode):
            raise _no_file(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_range(descriptor: int, offset: int, size: int) -> np.ndarray:
    """uint8 (size,), or fewer where the file ends; by positional reads, so that threads can share the descriptor."""
    content = np.empty(size, np.uint8)
    rest = content.data
    while rest:
        count = os.preadv(descriptor, [rest], offset + size - len(rest))
        if not count:
            return content[: size - len(rest)]
        rest = rest[count:]
    return content


def read_file(path: str | os.PathLike[str]) -> np.ndarray:
    """uint8 (bytes,), all of a regular file. UserError as `open_file`."""
    descriptor = open_file(path)
    try:
        return read_range(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _no_file(path: str | os.PathLike[str]) -> UserError:
    return UserError(f"{os.fspath(path)}: is no file, but a pipe, a socket, a device or a folder; remove it")
