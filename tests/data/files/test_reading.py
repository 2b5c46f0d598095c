"""Errors of the file system are waited out for a while; nothing else is tried again."""

from __future__ import annotations

import errno

import pytest

from hvd_lb.data.files.reading import RETRY_AFTER_SECONDS, retried
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
