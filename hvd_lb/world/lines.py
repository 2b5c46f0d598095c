"""The connections by which an engine has joined this process with others, so that they can be cut.

A process that waits within a library for one that has died, or stands still, waits for ever, or for minutes. Cutting
its connections gives it an error at once, whatever the library does, and so those who wait for this process.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hvd_lb.errors import ExchangeError

# Between two looks at a reduction: nothing at first, when most are done; then this share of what was waited, up to a
# bound in seconds. So waiting is prolonged by little, and takes some hundredths of a core.
_AT_ONCE, _SHARE, _LONGEST = 50e-6, 1 / 16, 1e-3
# An error of a cut connection comes at once. Gloo has none for a message that is under way, and waits for its timeout,
# but in the Horovod of docker/build-horovod.sh.
_LOST_SECONDS = 0.5
_INTERNET = (socket.AF_INET, socket.AF_INET6)


class Patience:
    """A wait of this process for the others: one that lasts is told once, as it may be for ever.

    A process that takes a step more than the others, or has other parameters, waits for what nobody begins.
    """

    SECONDS = 60.0

    def __init__(self, rank: int, name: str) -> None:
        self._rank, self._name, self._told = rank, name, False

    def tell(self) -> None:
        if not self._told:
            self._told = True
            print(
                f"rank {self._rank} has waited for the other processes for {self.SECONDS:g} s, for {self._name}. If "
                "none of them is busy, they make other calls: all processes call backward and step equally often, "
                "with the same count argument, and add, freeze, unfreeze and move the same parameters",
                file=sys.stderr,
                flush=True,
            )


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
    def are_cut(self) -> bool:
        return self._cut_at < math.inf

    def wait_for(self, done: Callable[[], bool], patience: Patience | None = None) -> None:
        """Sleep between looks until something is done by them; `ExchangeError` where they were cut, and it is not."""
        began = time.perf_counter()
        while not done():
            waited = time.perf_counter() - began
            if patience and waited > patience.SECONDS:
                patience.tell()
            time.sleep(0 if waited < _AT_ONCE else min(waited * _SHARE, _LONGEST))
            if time.monotonic() - self._cut_at > _LOST_SECONDS:
                raise ExchangeError("the connections were cut")


def _sockets() -> dict[int, int]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found[int(name)] = os.fstat(int(name)).st_ino
    return found
