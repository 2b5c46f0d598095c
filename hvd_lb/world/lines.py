"""The connections by which an engine has joined this process with others, so that they can be cut.

A process that waits within a library for one that has died, or stands still, waits for ever, or for minutes. Cutting
its connections gives it an error at once, whatever the library does, and so those who wait for this process.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_INTERNET = (socket.AF_INET, socket.AF_INET6)


class Lines:
    """The TCP sockets that were opened `while_joining`, by number of descriptor and of socket."""

    def __init__(self) -> None:
        self._sockets: dict[int, int] = {}
        self._cut_at = math.inf

    @contextmanager
    def while_joining(self) -> Iterator[None]:
        before = _sockets()
        yield
        self._sockets = {fd: inode for fd, inode in _sockets().items() if before.get(fd) != inode}

    def cut(self) -> None:
        """From any thread. Descriptors stay open, as the library closes them; one that listens it would miss."""
        self._cut_at = min(self._cut_at, time.monotonic())
        for fd, inode in self._sockets.items():
            with suppress(OSError):  # closed by now
                if os.fstat(fd).st_ino == inode:
                    with socket.socket(fileno=os.dup(fd)) as line:
                        listens = line.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                        if line.family in _INTERNET and not listens:
                            line.shutdown(socket.SHUT_RDWR)

    @property
    def cut_for(self) -> float:
        """Seconds since they were cut; below 0 where they were not."""
        return -1.0 if math.isinf(self._cut_at) else time.monotonic() - self._cut_at


def _sockets() -> dict[int, int]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found[int(name)] = os.fstat(int(name)).st_ino
    return found
