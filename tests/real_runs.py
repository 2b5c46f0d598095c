"""Whole runs with real processes that tests start, watch, kill and compare."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.replay.recorded import open_run
from hvd_lb.replay.verify import Examined, examine_records

Start = Callable[..., subprocess.Popen[str]]
# In records, and no mathematics.
OF_THE_MACHINE = ("images_per_second", "data_wait", "peak_memory_gb")
SMALL = ("--data", "digits", "--device", "cpu", "--model", "resnet8", "--threads", 1)


def finish(process: subprocess.Popen[str], status: int = 0, seconds: float = 240) -> tuple[str, str]:
    """What the process printed, once it has ended with this exit status."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == status, f"{out}\n{err}"
    assert "Traceback" not in out + err
    return out, err


def records(run: Path) -> list[dict[str, Any]]:
    """Those of training and evaluation."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] in ("train", "eval")]


def assert_equal_metrics(runs: Sequence[Path], relative: float) -> None:
    first, *others = map(records, runs)
    for other in others:
        assert len(other) == len(first)
        for a, b in zip(first, other, strict=True):
            for name in a.keys() - {"kind", *OF_THE_MACHINE}:
                assert b[name] == pytest.approx(a[name], rel=relative, abs=0), (name, a, b)
            assert b["kind"] == a["kind"]


def assert_agrees(run: Path) -> None:
    """Whatever has happened to it, records, checkpoints and summary tell of one run."""
    found = Examined(0)
    examine_records(open_run(run), found)
    assert found.problems == []


def processes_of(run: Path) -> list[int]:
    """Living processes that name the run on their command line, and their descendants."""
    parents, found = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_text(errors="surrogateescape")
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
            if str(run) in command:
                found.add(int(folder.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def kill_all(run: Path) -> None:
    """Leave no process of the run, also none that one of them has just started."""
    while processes := processes_of(run):
        kill(processes)
        time.sleep(0.01)


def until(condition: Callable[[], object], seconds: float = 120, every: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(every)


def trained_steps(run: Path) -> int:
    try:
        return sum('"train"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0
