"""Asks a fresh interpreter what an installed library is and can do.

An import of a wrongly built library may end the process or never return; here that is an answer, not the end
of the asker.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from hvd_lb.machine.process import signal_name


class ProbeError(Exception):
    """What the library said, in one line, when it could not be imported or used."""


Answer = dict[str, Any] | ProbeError  #: what asking gave


def ask(probe: str, timeout: float = 120) -> dict[str, Any]:
    """The answer of `probe` (of hvd_lb.doctor.probe) from a process of its own; ProbeError when there is none."""
    answer = ask_all([probe], timeout)[probe]
    if isinstance(answer, ProbeError):
        raise answer
    return answer


def ask_all(probes: Sequence[str], timeout: float = 120) -> dict[str, Answer]:
    """What each of several answers, asked at once. An interruption ends them, and waits for none."""
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        asked = {probe: stack.enter_context(_asked(probe)) for probe in probes}
        answers: dict[str, Answer] = {}
        for probe, process in asked.items():
            try:
                output, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
                answers[probe] = _answer(process.returncode, output, errors)
            except subprocess.TimeoutExpired:
                answers[probe] = ProbeError(f"no answer within {timeout:.0f} s")
        return answers


@contextmanager
def _asked(probe: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hvd_lb.doctor.probe", probe]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _answer(status: int, output: str, errors: str) -> Answer:
    if status < 0:
        return ProbeError(f"the process died of {signal_name(-status)}")
    lines = output.splitlines()
    if status > 0 or not lines:
        return ProbeError(last_line(errors) or f"exit code {status}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def last_line(text: str) -> str:
    """The last line with something in it: of a traceback, the one that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
