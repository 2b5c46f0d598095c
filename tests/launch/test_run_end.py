"""The end of a run: what was trained stays, whatever cannot be drawn or written then."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.launch import session
from hvd_lb.report.run_directory import RunDirectory

WORDS = (
    "simulate",
    "--data",
    "digits",
    "--device",
    "cpu",
    "--model",
    "resnet8",
    "--threads",
    "1",
    "--epochs",
    "1",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that came to its end; its name is a trap for markup, mathematics, ASCII and UTF-8."""
    run = tmp_path_factory.mktemp("finished") / "o[/b]$x_y$é\udcff"
    shown = str(run).replace("\udcff", r"\udcff")
    command = [sys.executable, "-m", "hvd_lb_cli.main", *WORDS, "--steps", "2", "--output", run]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    assert f"writing to {shown}\n" in done.stdout
    assert f"report: {shown}/report.html\n" in done.stdout
    assert done.stderr == ""
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDirectory:
    """A copy that was killed before it was summed up."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    run = RunDirectory(tmp_path / "run")
    for path in (run.summary, run.report, run.curves):
        path.unlink()
    return run


def state(run: Path) -> dict[Path, tuple[int, bytes]]:
    files = (path for path in run.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("steps", [2, 1])
@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_says_so_and_is_left_alone(
    hvd_lb: Callable[..., Any], finished: Path, steps: int, resume: bool
) -> None:
    before = state(finished)
    more = ("--resume", finished) if resume else ()
    said = hvd_lb(*WORDS, "--steps", steps, "--output", finished, *more)
    assert (said.status, said.err) == (0, "")
    assert said.out.count("\n") == 1
    assert f"is at the end of this run already (2 of {steps} steps)" in said.out
    assert state(finished) == before


def test_a_finished_run_without_checkpoints_is_not_begun_anew(
    hvd_lb: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = state(tmp_path / "run")
    said = hvd_lb(*WORDS, "--steps", 2, "--output", tmp_path / "run")
    assert said.status == 0
    assert f"{tmp_path}/run is at the end of this run already" in said.out
    assert state(tmp_path / "run") == before


def test_the_end_of_another_run_is_no_place_to_begin(
    hvd_lb: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    said = hvd_lb(*WORDS, "--steps", 2, "--output", tmp_path / "new", "--resume", finished)
    assert said.status == 2
    assert "is at the end of this run already" in said.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("reason", ["interrupted by SIGTERM", "failed: rank 1", None])
def test_a_run_that_ended_with_its_last_checkpoint_is_summed_up(
    hvd_lb: Callable[..., Any], run: RunDirectory, reason: str | None
) -> None:
    run.summary.write_text(json.dumps({"exit_reason": reason, "steps": 2}) if reason else "{")
    said = hvd_lb(*WORDS, "--steps", 2, "--output", run.path)
    assert (said.status, said.err) == (0, "")
    assert json.loads(run.summary.read_text())["exit_reason"] == "stopped at --steps"
    assert run.report.exists()


@pytest.mark.parametrize("failing", ["plots.plot_curves", "page.runs.write_report"])
def test_a_picture_or_page_that_fails_is_a_warning(
    hvd_lb: Callable[..., Any], run: RunDirectory, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def broken(*_: object) -> None:
        assert run.summary.exists()  # which comes first
        raise RuntimeError("no\nfont [/b]")

    monkeypatch.setattr(f"hvd_lb.report.{failing}", broken)
    said = hvd_lb(*WORDS, "--steps", 2, "--output", run.path)
    assert said.status == 0
    missing, other = (run.curves, run.report) if "curves" in failing else (run.report, run.curves)
    assert f"warning: {missing.name} could not be made (no font [/b])\n" in said.out
    assert not missing.exists()
    assert other.exists()
    assert "wall time" in said.out


def test_a_disk_too_full_for_the_summary(
    hvd_lb: Callable[..., Any], run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = session.write_json

    def full(path: Path, content: dict[str, Any]) -> None:
        if path == run.summary:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    with monkeypatch.context() as broken:
        broken.setattr(session, "write_json", full)
        said = hvd_lb(*WORDS, "--steps", 2, "--output", run.path)
    assert said.status == 1
    assert "summary.json could not be written (No space left on device)" in said.out
    assert hvd_lb(*WORDS, "--steps", 2, "--output", run.path).status == 0
    assert run.summary.exists()


def test_one_error_of_the_file_system_at_the_end(
    hvd_lb: Callable[..., Any], run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failed = session.summarise, []

    def stale(*arguments: Any, **named: Any) -> Any:
        if not failed:
            failed.append(1)
            raise OSError(errno.ESTALE, "Stale file handle")
        return original(*arguments, **named)

    monkeypatch.setattr(session, "summarise", stale)
    assert hvd_lb(*WORDS, "--steps", 2, "--output", run.path).status == 0
    assert failed
    assert run.summary.exists()


def test_a_run_that_went_on_meanwhile_is_not_cut_back(
    hvd_lb: Callable[..., Any], run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = session.resume_point_of

    def slow(*arguments: Any) -> Any:
        found = original(*arguments)
        shutil.copytree(run.checkpoints / "step-00000002", run.checkpoints / "step-00000003")
        return found

    monkeypatch.setattr(session, "resume_point_of", slow)
    said = hvd_lb(*WORDS, "--steps", 2, "--output", run.path)
    assert said.status == 2
    assert "another run has just ended" in said.err
    assert (run.checkpoints / "step-00000003").exists()


def test_what_is_asked_on_a_full_disk_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Processes:
        full = True

        def ask_to_stop(self, number: int) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")

    class Display:
        notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    processes, display = Processes(), Display()
    asked: Any = session._Asked
    asked = asked(processes, display)
    for _ in range(3):
        asked.to_stop(session.signal.SIGTERM)
    (problem,) = display.notes
    assert problem.startswith("SIGTERM: the processes cannot be told yet (No space left on device)")
    processes.full = False
    for _ in range(3):
        asked.to_stop(session.signal.SIGTERM)
    assert display.notes[1:] == ["SIGTERM: finishing this step, then a checkpoint; again to end at once"]
