"""What a run outlives, or ends by with nothing lost: its terminal, whoever reads its output, a disk that is full."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from real_runs import SMALL, Start, assert_agrees, finish, processes_of, records, trained_steps, until

from hvd_lb.training.checkpoint import open_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]


def a_run(run: Path, *more: object, steps: int = 60_000, processes: int = 1) -> list[str]:
    words = ("train", *SMALL, "--gpus", 2, "--processes", processes, "--epochs", 3000, "--steps", steps)
    every = ("--eval-every", "never", "--checkpoint-every", "never", "--log-every", 1)
    return [str(word) for word in (*words, *every, "--output", run, *more)]


def reason(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["exit_reason"])


def on_a_terminal(words: list[str], prepare: Callable[[], None]) -> tuple[subprocess.Popen[bytes], int]:
    """The command in a session of its own on a new terminal, and that terminal: to be read, and closed."""
    ours, theirs = pty.openpty()

    def take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        prepare()

    command = [sys.executable, "-m", "hvd_lb_cli.main", *words]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take
    )
    os.close(theirs)
    return process, ours


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process, terminal = on_a_terminal(
        a_run(run, processes=2), lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL) and None
    )
    until(lambda: trained_steps(run) > 3)
    os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert reason(run) == "interrupted by SIGHUP"
    assert (run / "checkpoints" / "last" / "state.json").exists()
    assert not processes_of(run)


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = a_run(run, steps=150)
    process, terminal = on_a_terminal(words, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None)
    until(lambda: trained_steps(run) > 3)
    os.close(terminal)
    assert process.wait(240) == 0
    assert reason(run) == "stopped at --steps"
    assert (run / "report.html").exists()


def test_a_killed_rank_is_started_again_where_that_was_asked_for(start: Start, tmp_path: Path) -> None:
    """To the same bits."""
    words = ("--reproducible", "--checkpoint-every", "5steps", "--steps", 60)
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(*a_run(whole, *words)))
    process = start(*a_run(run, *words, "--restarts", 1, processes=2))
    ranks = run / "logs" / "ranks.json"
    until(lambda: trained_steps(run) > 8 or process.poll() is not None)
    first = json.loads(ranks.read_text())["ranks"]["1"]["pid"]
    os.kill(first, signal.SIGKILL)
    out, err = finish(process)
    assert out.count("starting again (--restarts; 0 more after this one)") == 1
    assert "going on from step" in out
    assert err.startswith("hvd-lb: error: rank 1 ")
    assert err.count("\n") == 1
    assert (run / "logs" / "attempt-1").is_dir()
    ends = [open_checkpoint(folder / "checkpoints" / "last").model() for folder in (whole, run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_reader_that_is_gone_ends_nothing(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*a_run(run, "--eval-every", "20steps", steps=100, processes=2))
    assert process.stdout
    for line in process.stdout:
        if "evaluation" in line:
            break
    process.stdout.close()
    assert process.wait(240) == 0
    assert process.stderr
    assert process.stderr.read() == ""
    assert reason(run) == "stopped at --steps"
    assert len(records(run)) == 105


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs root for a disk of 32 MB")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_is_full_for_a_while_loses_no_record(start: Start, small_disk: Path) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    process = start(*a_run(run, steps=400))
    until(lambda: trained_steps(run) > 3)
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    assert shutil.disk_usage(small_disk).free == 0
    heartbeat = (run / "logs" / "progress.json").stat().st_mtime_ns
    time.sleep(3)  # some heartbeats
    assert process.poll() is None
    assert (run / "logs" / "progress.json").stat().st_mtime_ns <= heartbeat + 10**9
    assert 0 < trained_steps(run) < 400
    ballast.unlink()
    out, err = finish(process)
    assert err == ""
    assert "cannot be written (No space left on device): training goes on, and it is tried again" in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(400))
    assert any(line["kind"] == "warning" for line in lines)
    assert reason(run) == "stopped at --steps"
    assert_agrees(run)
