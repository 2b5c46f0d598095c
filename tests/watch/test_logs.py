"""Which logs a run has, and reading them from their end while they grow."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lb.errors import UserError
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.watch import logs
from hvd_lb.watch.logs import LogReader, find_logs, log_folder


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    for name in (
        "launching.log",
        "launcher.log",
        "rank-0000-h1.log",
        "rank-0001-h-2.log",
        "rank-0012-h3.log",
    ):
        (run.logs / "attempt-2").mkdir(parents=True, exist_ok=True)
        (run.logs / name).write_text(f"{name}\n")
    return run


@pytest.mark.parametrize(
    ("rank", "labels"),
    [
        (None, ["launching", "launcher", "rank 0"]),
        ("all", ["launching", "launcher", "rank 0", "rank 1", "rank 12"]),
        ("12", ["rank 12"]),
    ],
)
def test_which_logs(run: RunDirectory, rank: str | None, labels: list[str]) -> None:
    assert [log.label for log in find_logs(run.logs, rank)] == labels


def test_what_is_not_there_is_said(run: RunDirectory) -> None:
    with pytest.raises(UserError, match="has no log of rank 4: there are those of ranks 0 to 12"):
        find_logs(run.logs, "4")
    with pytest.raises(UserError, match="no rank has started yet"):
        find_logs(run.logs / "attempt-2", "0")
    assert log_folder(run, 2) == run.logs / "attempt-2"
    with pytest.raises(UserError, match="no logs of attempt 1: those of attempts 2 to 2 are there"):
        log_folder(run, 1)


@given(text=st.text("ab\n", max_size=60), last=st.integers(0, 8), block=st.integers(1, 9))
def test_the_last_lines_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, last: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("logs") / "a.log"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "_BLOCK", block)
        reader = LogReader(path, last)
    shown = [*reader.lines(), *reader.rest()]
    assert shown == (text.splitlines()[-last:] if last else [])


def test_a_huge_log_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.log"
    with path.open("wb") as file:
        file.seek(1 << 40)  # a hole
        file.write(b"\nlast but one\nlast\n")
    assert LogReader(path, 2).lines() == ["last but one", "last"]


def test_lines_are_given_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    reader = LogReader(path, 10)
    assert reader.lines() == []
    with path.open("wb", buffering=0) as file:
        file.write(b"one\ntw")
        assert reader.lines() == ["one"]
        file.write(b"o\nno text \xff\npart")
        assert reader.lines() == ["two", "no text \ufffd"]
    assert (reader.lines(), reader.rest(), reader.rest()) == ([], ["part"], [])


def test_a_log_of_a_new_start_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("one\ntwo\n")
    reader = LogReader(path, 10)
    assert reader.lines() == ["one", "two"]
    os.rename(path, tmp_path / "moved")
    assert reader.lines() == []
    path.write_text("a longer one\nfour\n")
    assert reader.lines() == ["a longer one", "four"]
