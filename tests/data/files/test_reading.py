"""Errors of the file system are waited out for a while; nothing else is tried again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.files.reading import RETRY_AFTER_SECONDS, read_file, retried
from hvd_lb.errors import UserError


class Flaky:
    """Raises the given errors, one a call, then returns 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def test_passing_errors_are_waited_out() -> None:
    flaky = Flaky(OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error"))
    assert retried(flaky, "a.jpg") == 7
    assert flaky.calls == 3


def test_lasting_errors_name_the_path_and_the_reason() -> None:
    flaky = Flaky(*(OSError(errno.ETIMEDOUT, "Connection timed out") for _ in range(9)))
    with pytest.raises(UserError, match=r"^a.jpg: cannot be read \(Connection timed out, 3 times\)"):
        retried(flaky, "a.jpg")
    assert flaky.calls == 3


@pytest.mark.parametrize("error", [OSError("image file is truncated"), ValueError("no number")])
def test_other_errors_pass_at_once(error: Exception) -> None:
    flaky = Flaky(error)
    with pytest.raises(type(error)):
        retried(flaky, "a.jpg")
    assert flaky.calls == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR])
def test_what_no_waiting_mends_is_told_at_once(number: int) -> None:
    flaky = Flaky(OSError(number, "Permission denied"))
    with pytest.raises(UserError, match=r"^a.jpg: cannot be read \(Permission denied\)$"):
        retried(flaky, "a.jpg")
    assert flaky.calls == 1


def test_about_ten_seconds_are_waited() -> None:
    assert 5 <= sum(RETRY_AFTER_SECONDS) <= 15


def test_a_file_is_read_whole_whatever_a_read_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    path = tmp_path / "a.jpg"
    content.tofile(path)
    np.testing.assert_array_equal(read_file(str(path)), content)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [into[0][:999]], at))
    np.testing.assert_array_equal(read_file(str(path)), content)
    (tmp_path / "empty.jpg").touch()
    assert len(read_file(str(tmp_path / "empty.jpg"))) == 0


def test_a_stale_handle_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"bytes")
    preadv, failures = os.preadv, [errno.ESTALE, errno.EIO]

    def flaky(*of: object) -> int:
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return preadv(*of)

    monkeypatch.setattr(os, "preadv", flaky)
    before = len(os.listdir("/proc/self/fd"))
    assert read_file(str(path)).tobytes() == b"bytes"
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(
            UserError, match=f"{name}.jpg: is no file, but a pipe, a socket, a device or a folder"
        ):
            read_file(str(tmp_path / f"{name}.jpg"))
