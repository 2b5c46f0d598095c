"""Ctrl-C, also twice, and SIGTERM end a command in one line, with all that it has started and leaving no parts."""

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from real_runs import Start, processes_of, until

pytestmark = pytest.mark.slow

Begun = Callable[[subprocess.Popen[str], Path], object]


def says(text: str) -> Begun:
    """Whether it has said that, after which it works."""

    def begun(process: subprocess.Popen[str], folder: Path) -> bool:
        assert process.stdout
        said = any(text in line for line in iter(process.stdout.readline, ""))
        time.sleep(1)
        return said

    return begun


def children(process: subprocess.Popen[str]) -> list[str]:
    try:
        return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return []


COMMANDS: dict[str, tuple[tuple[object, ...], Begun]] = {
    "data pack": (
        ("data", "pack", "digits", "shards", "--shard-size", "20kB"),
        lambda process, folder: len(list(folder.glob("shards/.unfinished/*.tar"))) > 3,
    ),
    "simulate": (("simulate", "--gpus", 256, "--device", "cpu", "--budget", "900s"), says("memory: ")),
    "doctor": (("doctor",), lambda process, folder: len(children(process)) > 2),
    "doctor --network": (
        ("doctor", "--network", "--device", "cpu", "--output", "."),
        lambda process, folder: list(folder.glob(".hvd-lb-measuring-*/logs/rank-*.log")),
    ),
}


@pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")
@pytest.mark.parametrize(
    ("command", "numbers"),
    [
        ("data pack", (signal.SIGINT, signal.SIGINT)),
        ("simulate", (signal.SIGTERM,)),
        ("doctor", (signal.SIGINT, signal.SIGINT)),
        ("doctor --network", (signal.SIGINT, signal.SIGINT)),
    ],
)
def test_a_signal_ends_it_in_one_line(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    numbers: tuple[signal.Signals, ...],
) -> None:
    words, begun = COMMANDS[command]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path / "temporary"))
    process = start(*words, cwd=tmp_path)
    until(lambda: begun(process, tmp_path) or process.poll() is not None, every=0.01)
    started = children(process)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (128 + numbers[0], -numbers[0])
    assert err.strip() == f"hvd-lb: error: interrupted{' by SIGTERM' if signal.SIGTERM in numbers else ''}"
    until(lambda: not processes_of(tmp_path), 30)
    until(lambda: not any(Path("/proc", pid).exists() for pid in started), 30)
    left = {path.name for folder in (tmp_path, tmp_path / "temporary") for path in folder.iterdir()}
    assert left <= {"temporary", "shards", f"torchinductor_{getpass.getuser()}"}
    assert not (tmp_path / "shards" / "manifest.json").exists()
