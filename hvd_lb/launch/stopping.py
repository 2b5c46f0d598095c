"""Ending a run with a checkpoint: by a signal to a worker, or by a file through which the launching process asks.

The launching process cannot signal its workers: horovodrun lies between, and would end them. So it writes
RUN/logs/stop, which rank 0 looks for in every step. A scheduler's signal may reach workers directly, on any rank.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Called, it gives the number of the signal by which the run shall end, or 0. A second signal ends the process."""

    def __init__(self, file: Path):
        self._file, self._signal = file, 0
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def __call__(self) -> int:
        if not self._signal and self._file.exists():
            self._signal = int(self._file.read_text() or signal.SIGTERM)
        return self._signal

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._signal:
            os._exit(128 + number)
        self._signal = number
