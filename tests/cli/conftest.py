"""The command line as its user meets it, in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hvd_lb_cli.main import main


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


@pytest.fixture
def hvd_lb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """hvd_lb("train", …) in this process."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["hvd-lb", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Said(int(end.value.code or 0), captured.out, captured.err)

    return run
