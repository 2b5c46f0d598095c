"""One run at a time in a directory, by whatever lock its file system has."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.machine.process import this_process
from hvd_lb.report import lock
from hvd_lb.report.run_directory import RunDirectory

MISSING = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL]
# Holds the lock until its input ends.
HOLDER = """
import errno, fcntl, sys
from pathlib import Path
from hvd_lb.report.run_directory import RunDirectory

def refuse(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

for name in sys.argv[2:]:
    setattr(fcntl, name, refuse)
held = RunDirectory(Path(sys.argv[1])).lock()
print("held", flush=True)
sys.stdin.read()
"""


def without(monkeypatch: pytest.MonkeyPatch, *names: str, number: int = errno.ENOSYS) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in names:
        monkeypatch.setattr(fcntl, name, refuse)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def maker(run: RunDirectory) -> Path:
    return run.logs / "lock.json"


def test_flock_needs_no_warning_and_lasts_as_long_as_who_inherited_it(run: RunDirectory) -> None:
    held = run.lock()
    assert held.warning == ""
    child = subprocess.Popen(["sleep", "60"], pass_fds=(held.descriptor,))
    held.close()
    with pytest.raises(UserError, match="in use by another run"):
        run.lock()
    child.kill()
    child.wait()
    run.lock().close()
    assert not maker(run).exists()


def test_a_folder_that_was_renamed_is_taken_again_unless_another_run_is_there(
    run: RunDirectory, tmp_path: Path
) -> None:
    held = run.lock()
    for name in ("renamed", "again"):
        assert held.is_held()
        run.path.rename(tmp_path / name)
        assert not held.is_held()
        run.logs.mkdir(parents=True)
        if name == "renamed":
            held.take_again()
    other = run.lock()
    with pytest.raises(UserError, match="in use by another run"):
        held.take_again()
    held.close()
    with pytest.raises(UserError, match="in use by another run"):
        run.lock()
    other.close()


@pytest.mark.parametrize("number", MISSING, ids=errno.errorcode.get)
def test_without_flock_fcntl_locks(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    without(monkeypatch, "flock", number=number)
    held = run.lock()
    assert "locked by fcntl" in held.warning
    assert not maker(run).exists()
    held.close()


@pytest.mark.parametrize("number", MISSING, ids=errno.errorcode.get)
def test_without_either_a_file_stands_for_a_lock(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    without(monkeypatch, "flock", "lockf", number=number)
    held = run.lock()
    assert str(maker(run)) in held.warning
    assert json.loads(maker(run).read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        run.lock()
    held.close()
    assert not maker(run).exists()
    run.lock().close()


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), ("flock",), ("flock", "lockf")], ids=["flock", "fcntl", "file"])
def test_another_process_is_kept_out_until_it_is_dead(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    without(monkeypatch, *missing)
    command = [sys.executable, "-c", HOLDER, run.path, *missing]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by"):
            run.lock()
        holder.kill()
        holder.wait()
    assert maker(run).exists() == (len(missing) == 2)
    held = run.lock()
    if maker(run).exists():
        assert json.loads(maker(run).read_text())["pid"] == os.getpid()
    held.close()
    assert {path.name for path in run.logs.iterdir()} == set()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"host": "h2"}, "in use by process {pid} on host h2, or was when that host went down: remove"),
        ({"machine": "another boot"}, "or was when that host went down: remove"),
        ({"pid": "x"}, "is damaged: remove it if no run writes there"),
        (None, "is damaged: remove it if no run writes there"),
    ],
)
def test_whose_lock_cannot_be_judged_here_is_left_to_a_person(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any] | None, said: str
) -> None:
    without(monkeypatch, "flock", "lockf")
    run.logs.mkdir(parents=True)
    text = "" if changed is None else json.dumps({**this_process(), "started": 1, **changed})
    maker(run).write_text(text)
    with pytest.raises(UserError, match=said.format(pid=os.getpid())):
        run.lock()
    assert maker(run).read_text() == text


def test_a_number_that_another_process_has_by_now_is_a_dead_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "flock", "lockf")
    run.logs.mkdir(parents=True)
    maker(run).write_text(json.dumps({**this_process(), "started": 1}))
    run.lock().close()


def test_who_is_faster_to_take_over_a_dead_one_s_lock_keeps_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "flock", "lockf")
    run.logs.mkdir(parents=True)
    maker(run).write_text(json.dumps({**this_process(), "started": 1}))
    refuse, faster = lock._refuse_living, json.dumps(this_process())

    def look(path: Path, content: bytes, folder: Path) -> None:
        refuse(path, content, folder)
        path.write_text(faster)

    monkeypatch.setattr(lock, "_refuse_living", look)
    with pytest.raises(UserError, match="in use by another run"):
        run.lock()
    assert maker(run).read_text() == faster
    assert [path.name for path in run.logs.iterdir()] == [maker(run).name]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES], ids=errno.errorcode.get)
def test_either_word_for_a_lock_that_another_holds_is_understood(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """POSIX leaves it to the system which of them fcntl says."""
    without(monkeypatch, "flock")
    without(monkeypatch, "lockf", number=number)
    with pytest.raises(UserError, match="in use by another run"):
        run.lock()


def test_another_error_of_the_file_system_is_told(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "flock", number=errno.EIO)
    with pytest.raises(UserError, match="cannot be written .Input/output error."):
        run.lock()
