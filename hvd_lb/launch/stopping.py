"""Ending a run with a checkpoint: by a signal to a rank, or by a file through which the launching process asks.

The launching process does not signal the ranks, which no launcher but our own would hand on: it writes
RUN/logs/stop, which a thread of rank 0 looks for. `hvd-lb stop` writes it on whatever machine, and the launching
process looks for it, too. A scheduler's signal may reach any rank directly.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# The last two are what schedulers send, where they are asked to, some minutes before they end a job.
_ALWAYS = (signal.SIGINT, signal.SIGTERM)
_UNLESS_TAKEN = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: In the file: end now, without a checkpoint.
AT_ONCE = "at once"
_LOOK_SECONDS = 0.25
_SAME_SECONDS = 1.0


def heeded_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a run: not those that nohup, say, has set to be ignored, or a library handles."""
    return (*_ALWAYS, *(number for number in _UNLESS_TAKEN if not _taken(number)))


def _taken(number: int) -> bool:
    handler = signal.getsignal(number)
    if handler is not signal.SIG_DFL:
        return handler in (signal.SIG_IGN, None)
    try:  # one that Python knows nothing of, such as faulthandler's
        status = Path("/proc/self/status").read_text("utf-8", "replace")
        return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError):  # macOS
        return False


def read_wish(file: Path) -> str:
    """What RUN/logs/stop asks for: the number of a signal, AT_ONCE, or nothing, as long as it cannot be read."""
    try:
        # Opening the folder asks the server: a client of NFS may else hold for a minute that there is no such file.
        os.close(os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY))
        return file.read_bytes().decode("ascii", "replace").strip()
    except OSError:
        return ""


class StopRequests:
    """Called, it gives the number of the signal by which the run shall end, or 0.

    The file is looked for while it is `watched`: by one process, as many would load a shared file system. A second
    signal ends the process, by `end` with a status, and so does any one after AT_ONCE was written. One that comes at
    once after the first is the same: launchers pass on what the terminal has sent to all.
    """

    def __init__(self, file: Path, end: Callable[[int], object] = os._exit):
        self._file, self._end, self._signal, self._since = file, end, 0, 0.0
        for number in heeded_signals():
            signal.signal(number, self._receive)

    def __call__(self) -> int:
        return self._signal

    def taken_back(self, number: int) -> bool:
        """Whether it was this signal; then the run shall not end any more."""
        if self._signal != number:
            return False
        self._signal = 0
        return True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a thread looks for the file: a file system that hangs keeps no step waiting."""
        over = threading.Event()

        def look() -> None:
            while not over.is_set():
                text = read_wish(self._file)
                if text == AT_ONCE:  # also where the launching process is gone, or stands still
                    self._end(128 + signal.SIGTERM)
                if text.isdecimal():
                    self._signal = self._signal or int(text)
                over.wait(_LOOK_SECONDS)

        threading.Thread(target=look, name="hvd-lb stop file", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _receive(self, number: int, _: FrameType | None) -> None:
        again = self._signal and time.monotonic() - self._since >= _SAME_SECONDS
        if again or read_wish(self._file) == AT_ONCE:
            self._end(128 + number)
        if not self._signal:
            self._signal, self._since = number, time.monotonic()


_present: StopRequests | None = None


def stop_requests(file: Path, end: Callable[[int], object] = os._exit) -> StopRequests:
    """Those of this process, which may hear signals already: a rank does before it loads torch."""
    global _present
    _present = _present or StopRequests(file, end)
    return _present
