"""Asks a fresh interpreter what an installed library is and can do.

An import of a wrongly built library may end the process or never return; here that is an answer, not the end
of the asker.
"""

import json
import signal
import subprocess
import sys
from typing import Any


class ProbeError(Exception):
    """What the library said, in one line, when it could not be imported or used."""


Answer = dict[str, Any] | ProbeError  #: what asking gave


def ask(probe: str, timeout: float = 120) -> dict[str, Any]:
    """The answer of `probe` (of hvd_lb.doctor.probe) from a process of its own; ProbeError when there is none."""
    command = [sys.executable, "-m", "hvd_lb.doctor.probe", probe]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {timeout:.0f} s") from None
    if completed.returncode < 0:
        raise ProbeError(f"the process died of {signal.Signals(-completed.returncode).name}")
    lines = completed.stdout.splitlines()
    if completed.returncode > 0 or not lines:
        raise ProbeError(last_line(completed.stderr) or f"exit code {completed.returncode}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def last_line(text: str) -> str:
    """The last line with something in it: of a traceback, the one that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
