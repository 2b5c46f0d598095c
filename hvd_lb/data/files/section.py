"""A range of bytes of an open file as a file of its own: an image file, or a member of a tar file."""

from __future__ import annotations

import os
from collections.abc import Callable

WINDOW = 4096
"""Bytes that are read at once."""


class Section:
    """`length` bytes that `pread(count, position)` gives, read-only; nothing beyond their end is read or allocated,
    whatever a broken header asks for. `failure` keeps what the operating system raised, as callers such as PIL take
    it for a broken file.
    """

    def __init__(self, pread: Callable[[int, int], bytes], length: int) -> None:
        self.length = length
        self.failure: OSError | None = None
        self._pread = pread
        self._position = 0
        self._window = b""
        self._window_at = 0

    @classmethod
    def of_file(cls, descriptor: int, offset: int, length: int) -> Section:
        """Bytes `offset` … `offset + length`, by positional reads: threads can share the descriptor."""
        return cls(lambda count, position: os.pread(descriptor, count, offset + position), length)

    @classmethod
    def of_bytes(cls, content: bytes | memoryview) -> Section:
        return cls(lambda count, position: bytes(content[position : position + count]), len(content))

    def at(self, position: int, count: int) -> bytes:
        """`count` bytes from `position`; fewer at the end. Small ones come from a window that is read at once."""
        count = min(count, self.length - position)
        if count <= 0:
            return b""
        start = position - self._window_at
        if not 0 <= start <= start + count <= len(self._window):
            if count > WINDOW:
                return self._read(count, position)
            self._window = self._read(min(WINDOW, self.length - position), position)
            self._window_at, start = position, 0
        return self._window[start : start + count]

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.length - self._position)
        content = self.at(self._position, left if count is None or count < 0 else min(count, left))
        self._position += len(content)
        return content

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if start + position < 0:
            raise ValueError(f"seek to {start + position}")
        self._position = start + position
        return self._position

    def tell(self) -> int:
        return self._position

    def _read(self, count: int, position: int) -> bytes:
        try:
            return self._pread(count, position)
        except OSError as error:
            self.failure = error
            raise
