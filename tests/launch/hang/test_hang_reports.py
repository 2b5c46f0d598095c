"""Whether a job hangs and because of whom, from what its ranks report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.launch.hang.reports import HangReports
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.world.stages import Stage

HOSTS = {0: "h1", 1: "h1", 2: "h2", 3: "h2"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("hvd_lb.launch.hang.reports.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "logs").mkdir()
    return RunDirectory(tmp_path)


def report(run: RunDirectory, rank: int, stage: str, step: int = 41, more: float = 0.0) -> None:
    content = {"rank": rank, "stage": stage, "step": step, "seconds": 300.0, "patience": more}
    run.hang(rank).write_text(json.dumps(content))


def reports(run: RunDirectory, **options: Any) -> HangReports:
    return HangReports(run, HOSTS, options.get("timeout", 300.0))


def test_who_does_something_else_is_named_when_the_others_wait(run: RunDirectory, clock: list[float]) -> None:
    judge = reports(run)
    assert judge.look() is None
    report(run, 2, Stage.DATA)
    clock[0] += 1000  # nobody waits for it: a long microbatch
    assert judge.look() is None
    for rank in (0, 1):
        report(run, rank, Stage.NETWORK)
    clock[0] += 2
    assert judge.look() is None  # rank 3 may be about to report
    report(run, 3, Stage.NETWORK)
    clock[0] += 2
    assert judge.look() == (
        f"no step for 300 s: rank 2 on h2 has not arrived in step 41 (waiting for data); stacks in {run.logs}"
    )


def test_who_reports_nothing_is_named_after_a_while(run: RunDirectory, clock: list[float]) -> None:
    for rank in (0, 2):
        report(run, rank, Stage.NETWORK)
    (run.logs / "rank-0001-h1.log").write_text("warning\nTimeout (0:05:00)!\nThread 0x1\n")
    judge = reports(run)
    assert judge.look() is None
    clock[0] += 74
    assert judge.look() is None
    clock[0] += 2
    said = judge.look() or ""
    assert "rank 1 on h1 has not arrived in step 41 (within a library), rank 3 on h2 has" in said
    assert "(stopped or unreachable); stacks" in said


def test_a_wait_that_ends_begins_anew(run: RunDirectory, clock: list[float]) -> None:
    report(run, 0, Stage.NETWORK)
    judge = reports(run)
    for _ in range(5):
        assert judge.look() is None
        run.hang(0).unlink()
        clock[0] += 70
        assert judge.look() is None
        report(run, 0, Stage.NETWORK)
        clock[0] += 70


def test_what_takes_long_by_right_is_waited_for(run: RunDirectory, clock: list[float]) -> None:
    report(run, 0, Stage.CHECKPOINT, more=510)
    for rank in (1, 2, 3):
        report(run, rank, Stage.NETWORK)
    judge = reports(run)
    for _ in range(5):
        clock[0] += 100
        assert judge.look() is None
    clock[0] += 120
    assert "rank 0 on h1 has not arrived in step 41 (saving a checkpoint)" in (judge.look() or "")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Stage.NETWORK, "all ranks wait for each other in step 41"),
        (Stage.DATA, "rank 0 on h1 does not go on in step 41 (waiting for data), rank 1 on h1 does"),
    ],
)
def test_all_at_once(run: RunDirectory, clock: list[float], stage: Stage, words: str) -> None:
    for rank in range(4):
        report(run, rank, stage)
    said = reports(run).look() or ""
    assert words in said
    assert said.count("rank ") == (3 if stage is Stage.DATA else 0)
    assert ("and 1 more" in said) == (stage is Stage.DATA)


def test_neither_off_nor_what_is_no_report(run: RunDirectory, clock: list[float]) -> None:
    for rank, text in enumerate(["", "{", "[]", '{"rank": 3}']):
        run.hang(rank).write_text(text)
    assert reports(run).look() is None
    for rank in range(4):
        report(run, rank, Stage.DATA)
    assert reports(run, timeout=0.0).look() is None
