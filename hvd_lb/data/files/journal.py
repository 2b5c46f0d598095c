"""What is known so far of something that takes long, kept on disk, so that who is interrupted goes on where he was."""

from __future__ import annotations

import errno
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

_SECONDS = 1.0
"""So much work may be lost; what takes less writes nothing."""

# What file systems say that can put files on the disk, and not the names in a folder: 9p, SMB, some of FUSE.
_NOT_OF_FOLDERS = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR}

_HEAD = struct.Struct("<QQI")  # start, bytes, checksum of all else


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder where the file system can, on the disk; OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OF_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


class Journal:
    """Blocks of bytes in `path`, each with the number of what it starts with; nothing is kept without a path.

    A file that cannot be written costs only time. A context manager, which closes the file and leaves it there.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._waiting: list[bytes] = []
        self._since = time.monotonic()

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """What a former process has left, up to the first block that is not whole; others are written behind that."""
        at = 0
        with suppress(OSError):
            if self._path is None or not self._path.exists():
                return
            with self._path.open("r+b") as file:
                while len(head := file.read(_HEAD.size)) == _HEAD.size:
                    start, size, checksum = _HEAD.unpack(head)
                    if size > os.fstat(file.fileno()).st_size - file.tell():
                        break
                    content = file.read(size)
                    if _checksum(start, content) != checksum:
                        break
                    at = file.tell()
                    yield start, content
                file.truncate(at)

    def append(self, start: int, content: bytes) -> None:
        """On disk within seconds."""
        if self._path is None:
            return
        self._waiting.append(_HEAD.pack(start, len(content), _checksum(start, content)) + content)
        if time.monotonic() - self._since < _SECONDS:
            return
        try:
            self._file = self._file or self._path.open("ab")
            self._file.write(b"".join(self._waiting))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._path = None
        self._waiting.clear()
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


def _checksum(start: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(b"block %d" % start))  # of zeros it is not 0
