"""Benchmarks one after another, each in a process of its own with a limit, within a limit for all."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress


def run_limited(command: Sequence[str], seconds: float) -> tuple[str, str, str]:
    """What a command prints in so many seconds, what it says of errors, and why it did not end well; it is ended with
    all that it started.
    """
    if seconds < 1:
        return "", "", "no time was left"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what was printed before it is ended is kept
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
        try:
            failure = f"exit status {code}" if (code := process.wait(seconds)) else ""
        except subprocess.TimeoutExpired:
            failure = f"more than {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        errors.seek(0)
        return out.read(), errors.read(), failure
