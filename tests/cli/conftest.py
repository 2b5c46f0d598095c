"""The command line as its user meets it: in this process where that is quick, as a real process where it matters."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start("train", …) as a process of its own; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hvd_lb_cli.main", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
