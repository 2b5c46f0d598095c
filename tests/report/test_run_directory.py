"""Files of a run: those of an earlier start are kept, and none is replaced by half."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.report.run_directory import RunDirectory, read_json, replace_text, write_json


def started(run: RunDirectory, mark: str) -> None:
    """What a start leaves in logs/."""
    for path in (run.error(0), run.heartbeat, run.stopped, run.stop, run.logs / "rank-0000-a.log"):
        path.write_text(mark)
    (run.logs / "launcher.log").write_text(mark)
    replace_text(run.job, mark, mode=0o600)


def test_what_each_start_wrote_is_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.logs.mkdir()
    run.keep_logs()
    assert not list(run.logs.iterdir())
    (run.logs / "slurm-7.out").write_text("a scheduler's, which writes on")
    (run.logs / "lock.json").write_text("of the run that is about to start")
    (run.logs / "nohup.log").write_text("of the shell that types the command again")
    (run.logs / "attempt-notes").mkdir()
    for attempt in (1, 2, 3):
        started(run, f"start {attempt}")
        run.keep_logs()
        run.keep_logs()  # nothing new: no folder
    kept = {"error-0000.json", "progress.json", "stopped.json", "rank-0000-a.log", "launcher.log", "job.json"}
    for attempt in (1, 2, 3):
        folder = run.logs / f"attempt-{attempt}"
        assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
            kept, f"start {attempt}"
        )
        assert (folder / "job.json").stat().st_mode & 0o777 == 0o600
    here = {"slurm-7.out", "lock.json", "nohup.log", "attempt-notes", "attempt-1", "attempt-2", "attempt-3"}
    assert {path.name for path in run.logs.iterdir()} == here


def test_a_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, {}),
        ("", {}),
        ("[1]", {}),
        ("[" * 100_000, {}),
        ('{"steps": "12", "epochs": [], "versions": 3, "chain": null, "other": 7}', {"chain": None, "other": 7}),
        ('{"steps": 12, "epochs": 1.5, "hosts": ["h1"]}', {"steps": 12, "epochs": 1.5, "hosts": ["h1"]}),
    ],
)  # fmt: skip
def test_what_is_damaged_or_of_another_kind_is_left_out(
    tmp_path: Path, content: str | None, found: dict[str, Any]
) -> None:
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    assert read_json(tmp_path / "file.json") == found


def test_what_a_crash_left_half_written_gives_neither_content_nor_mode(tmp_path: Path) -> None:
    before = os.umask(0)
    os.umask(before)
    left = tmp_path / ".summary.json.writing"
    left.write_text("half of another, which was longer")
    left.chmod(0o600)
    write_json(tmp_path / "summary.json", {"a": 1})
    assert read_json(tmp_path / "summary.json") == {"a": 1}
    assert (tmp_path / "summary.json").stat().st_mode & 0o777 == 0o666 & ~before
    assert not left.exists()
