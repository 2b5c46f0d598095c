"""Benchmarks one after another, each in a process of its own with a limit, within a limit for all."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path


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


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A type for argparse: some of these names, with commas between them."""

    def names(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(map(repr, unknown))}: expected some of {', '.join(known)}, with commas"
            )
        return given

    return names


def minutes(text: str) -> float:
    """A type for argparse."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return value


def file_to_write(text: str) -> Path:
    """A type for argparse: what is measured must not be lost at the end."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a file in a folder that is there")
    return path
