"""Real runs that are watched and stopped from outside, with and without a terminal."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from real_runs import SMALL, Start, finish, kill, kill_all, processes_of, trained_steps, until

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]


def long_run(run: Path, processes: int) -> list[object]:
    how = (
        "--gpus",
        2,
        "--processes",
        processes,
        "--epochs",
        2000,
        "--log-every",
        1,
        "--eval-every",
        "1epoch",
    )
    return ["train", *SMALL, *how, "--checkpoint-every", "never", "--output", run]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a [b] run"
    yield path
    kill_all(path)


def status(start: Start, run: Path) -> dict[str, Any]:
    return json.loads(finish(start("status", run, "--json"))[0])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_detached_run_is_watched_and_stopped(start: Start, run: Path, processes: int) -> None:
    out, err = finish(start(*long_run(run, processes), "--detach"))
    assert f"hvd-lb stop '{run}'" in out
    assert "minibatch: 2 virtual workers" in out  # the checks were made before the terminal
    assert err == ""
    until(lambda: trained_steps(run) > 5)
    now = status(start, run)
    assert (now["state"], now["processes"], now["total_steps"], now["errors"]) == (
        "running",
        processes,
        44000,
        [],
    )
    assert os.getsid(now["pid"]) == now["pid"] != os.getsid(0)
    assert Path(f"/proc/{now['pid']}/stat").read_text().split()[3] != str(os.getpid())
    following = start("logs", run, "--follow")
    out, _ = finish(start("stop", run))
    assert "is asked to end after its present step, with a checkpoint" in out
    assert "interrupted by SIGINT" in out
    said, _ = finish(following)
    assert "launching: minibatch: 2 virtual workers" in said
    assert "with a checkpoint; the same command goes on there" in said
    assert processes_of(run) == []
    after = status(start, run)
    assert (after["state"], after["alive"], after["pid"]) == ("interrupted", False, None)
    assert (run / "checkpoints" / "last").exists()
    assert "is not running: interrupted by SIGINT" in finish(start("stop", run))[0]


def test_a_run_is_ended_at_once_from_elsewhere(start: Start, run: Path) -> None:
    process = start(*long_run(run, 2))
    until(lambda: trained_steps(run) > 2)
    finish(start("stop", run, "--now"))
    out, _ = finish(process, 130)
    assert "stopped at once" in out
    assert not (run / "checkpoints" / "last").exists()
    assert processes_of(run) == []


def test_a_run_whose_launching_process_was_killed_is_lost_and_goes_on(start: Start, run: Path) -> None:
    process = start(*long_run(run, 2))
    until(lambda: trained_steps(run) > 2)
    kill([process.pid])
    process.wait()
    assert status(start, run)["state"] == "lost"
    until(lambda: not processes_of(run))
    assert "is not running: lost: its launching process" in finish(start("stop", run))[0]
    again = start(*long_run(run, 2))
    until(lambda: status(start, run)["state"] == "running", every=1)
    assert status(start, run)["start"] == 2
    finish(start("logs", run, "--attempt", 1))
    finish(start("stop", run, "--now"))
    finish(again, 130)


def test_a_failed_run_says_why(start: Start, run: Path) -> None:
    process = start(*long_run(run, 2))
    until(lambda: trained_steps(run) > 2)
    ranks = [
        pid for pid in processes_of(run) if b"launch.rank.entry" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    kill(ranks[-1:])
    finish(process, 1)
    now = status(start, run)
    assert now["state"] == "failed"
    assert "SIGKILL" in now["reason"]


def test_what_is_wrong_is_said_before_the_terminal_is_left(start: Start, run: Path) -> None:
    _, err = finish(start(*long_run(run, 1), "--detach", "--per-gpu-batch", 5000), 2)
    assert err.startswith("hvd-lb: error: a minibatch of 2 × 5000 = 10000 images")
    assert not run.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_interrupted_checks_leave_nothing(start: Start, run: Path, tmp_path: Path, number: int) -> None:
    """Hosts that never answer: no run directory, and no ssh."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f"#!/bin/sh\necho >> '{tmp_path}/asked'\nexec '{tmp_path}/asleep' 1000\n")
    ssh.chmod(0o755)
    (tmp_path / "asleep").symlink_to(shutil.which("sleep") or "")
    environment = {**os.environ, "PATH": f"{ssh.parent}:{os.environ['PATH']}"}
    for detach in ((), ("--detach",)):
        (tmp_path / "asked").unlink(missing_ok=True)
        command = _command(*long_run(run, 2), "--hosts", "h1:1,h2:1", *detach)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until(lambda: (tmp_path / "asked").exists() and (tmp_path / "asked").stat().st_size == 2)
        assert len(processes_of(tmp_path / "asleep")) == 2
        process.send_signal(number)
        _, err = finish(process, 128 + number)
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        assert err.strip() == f"hvd-lb: error: interrupted{by}"
        assert processes_of(tmp_path / "asleep") == []
        assert not run.exists()


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hvd_lb_cli.main", *map(str, arguments)]
