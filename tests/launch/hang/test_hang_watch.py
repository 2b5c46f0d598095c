"""A rank that does not go on reports that, and takes it back when it does."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hvd_lb.launch.hang.watch import watched
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.world.stages import Stage, Stages


def until(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hvd-lb hang"]


@pytest.mark.parametrize(
    ("stage", "taken", "patient"),
    [
        (Stage.DATA, 3, False),
        (Stage.COMPUTE, 0, True),
        (Stage.NETWORK, 0, False),
        (Stage.CHECKPOINT, 3, True),
    ],
)
def test_it_reports_what_it_does_until_it_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: Stage, taken: int, patient: bool
) -> None:
    (tmp_path / "logs").mkdir()
    run, stages = RunDirectory(tmp_path), Stages()
    stages.step, stages.taken = 7, taken
    with watched(run, 2, stages, 1.0):
        for _ in range(10):  # it goes on
            stages.enter(stage)
            stages.taken += taken > 0
            time.sleep(0.1)
        assert not run.hang(2).exists() or not taken
        until(lambda: run.hang(2).exists() and json.loads(run.hang(2).read_text())["seconds"] >= 1)
        report = json.loads(run.hang(2).read_text())
        assert (report["rank"], report["step"], report["stage"]) == (2, 7, stage)
        assert (report["patience"] > 1000) == patient
        # Stacks follow the report.
        until(lambda: "test_it_reports_what_it_does_until_it_goes_on" in capfd.readouterr().err)
        stages.enter(stage)
        stages.taken += 1
        until(lambda: not run.hang(2).exists())
    assert not watchers()  # at once: none reports, or asks for tracebacks, after the end


def test_a_slow_step_that_goes_on_asks_those_that_wait_for_patience(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    run, stages = RunDirectory(tmp_path), Stages()
    stages.taken = 1
    with watched(run, 0, stages, 2.0):
        for microbatch in range(50):
            stages.enter(Stage.COMPUTE)
            time.sleep(0.1)
            if microbatch > 25:  # more than twice as long as it is waited for without a sign of life
                assert json.loads(run.hang(0).read_text())["patience"] == 2
        stages.taken += 1
        until(lambda: not run.hang(0).exists())
    assert capfd.readouterr().err == ""


def test_who_waits_for_a_generation_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    run, stages = RunDirectory(tmp_path), Stages()
    stages.taken = 3
    with watched(run, 0, stages, 0.5):
        stages.enter(Stage.DATA)
        until(run.hang(0).exists)
        with stages.within(Stage.BETWEEN):
            until(lambda: not run.hang(0).exists())
            time.sleep(1.5)
            assert not run.hang(0).exists()
        until(run.hang(0).exists)


def test_who_was_stopped_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    run, stages, real, stopped = RunDirectory(tmp_path), Stages(), time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: real() + stopped)
    stages.taken = 3
    with watched(run, 0, stages, 4.0):
        stages.enter(Stage.NETWORK)
        time.sleep(1.0)
        stopped = 1000.0
        time.sleep(1.5)
        assert not run.hang(0).exists()
        until(run.hang(0).exists)


def test_what_this_process_has_reported_as_another_program_is_taken_back(tmp_path: Path) -> None:
    """By that the others would be waited for, for ever."""
    (tmp_path / "logs").mkdir()
    run, stages = RunDirectory(tmp_path), Stages()
    run.hang(1).write_text("{}")
    with watched(run, 1, stages, 10.0):
        until(lambda: not run.hang(1).exists())


def test_without_a_timeout_nobody_watches(tmp_path: Path) -> None:
    with watched(RunDirectory(tmp_path), 0, Stages(), 0.0):
        assert not watchers()


def test_a_library_that_holds_the_lock_from_the_start_is_seen(tmp_path: Path) -> None:
    """Before the thread that watches has looked for the first time."""
    program = """
        import ctypes, sys
        from pathlib import Path
        from hvd_lb.launch.hang.watch import watched
        from hvd_lb.report.run_directory import RunDirectory
        from hvd_lb.world.stages import Stages

        with watched(RunDirectory(Path(sys.argv[1])), 0, Stages(), 1.0):
            ctypes.PyDLL(None).sleep(3)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr
    assert "Timeout (0:00:01)" in said
