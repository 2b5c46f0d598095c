"""That a process launches a run is seen from outside, and what it prints is kept."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from real_runs import until
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from hvd_lb.machine.process import is_running
from hvd_lb.report import launching
from hvd_lb.report.launching import Recorded, SignOfLife
from hvd_lb.report.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.logs.mkdir()
    return run


def test_the_file_is_there_and_touched_as_long_as_the_run_is_launched(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "BEAT_SECONDS", 0.02)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    alive = SignOfLife(run)
    alive.begin({"total_steps": 5})
    try:
        record = json.loads(run.launching.read_text())
        assert (record["total_steps"], record["slurm_job"], is_running(record)) == (5, "7", True)
        for _ in range(2):
            os.utime(run.launching, (0, 0))
            until(lambda: run.launching.stat().st_mtime > 0, 20, every=0.01)
    finally:
        alive.end()
    assert not run.launching.exists()


def test_it_is_made_again_with_its_folder_and_that_of_another_run_stays(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "BEAT_SECONDS", 0.02)
    alive = SignOfLife(run)
    alive.begin({"total_steps": 5})
    try:
        run.launching.unlink()
        until(run.launching.exists, 20, every=0.01)
        theirs = {**json.loads(run.launching.read_text()), "pid": 1}
        run.launching.write_text(json.dumps(theirs))
    finally:
        alive.end()
    assert json.loads(run.launching.read_text()) == theirs


def test_one_that_never_began_ends_as_well(run: RunDirectory) -> None:
    SignOfLife(run).end()


def test_a_disk_that_takes_nothing_ends_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launching, "write_json", full)
    alive = SignOfLife(run)
    alive.begin({})
    alive.end()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_printed_is_kept_in_plain_lines(tmp_path: Path, terminal: bool) -> None:
    shown, file = io.StringIO(), tmp_path / "launching.log"
    console = Console(file=shown, force_terminal=terminal, markup=False, highlight=False, width=40)
    console.print("before")
    said = Recorded(console, file)
    said.begin()
    with Progress(console=console) as bar:
        bar.add_task("moving", total=3)
        console.print("a [b] line " + "of many words " * 5, soft_wrap=True)
        bar.refresh()
        console.print(Text.assemble(("warning:", "yellow"), " \udcff"), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_row("topic", "a sentence")
    console.print(table)
    said.end()
    console.print("after")
    assert file.read_text("utf-8") == (
        "a [b] line " + "of many words " * 5 + "\nwarning: \\udcff\ntopic  a sentence\n"
    )
    assert "after" in shown.getvalue()
    assert "moving" in shown.getvalue()


def test_where_nothing_can_be_kept_it_is_printed_all_the_same(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown)
    said = Recorded(console, tmp_path / "missing" / "launching.log")
    said.begin()
    console.print("a line")
    said.end()
    assert shown.getvalue() == "a line\n"
