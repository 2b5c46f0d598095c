"""Containers that take their time: whoever waits for them is told for which, and can end it."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker import group
from hvd_lb.launch.submit.docker.group import DockerContainers, Interrupted

SUBMISSION = Submission(
    arguments=("train",),
    name="one",
    device="cpu",
    processes=2,
    per_node=1,
    output=Path("/nowhere/run"),
    data=None,
    image="image",
    environment={},
)
ANSWERS = """import sys
print('{"host_key": "ssh-ed25519 AAAA"}', flush=True)
sys.stdin.read()"""
HANGS = "import sys; sys.stdin.read()"


def reach(host: str, command: Sequence[str]) -> list[str]:
    """In place of docker on two hosts, of which one does not start anything."""
    return ["true"] if "rm" in command else [sys.executable, "-c", ANSWERS if host == "h1" else HANGS]


def test_a_container_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(group, "_PATIENCE_SECONDS", 0.5)
    ends = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
    ends.start()
    with pytest.raises(Interrupted, match="SIGTERM"), DockerContainers(SUBMISSION, ["h1", "h2"], reach):
        pass
    ends.join()
    told = [line for line in capfd.readouterr().err.splitlines() if "waiting for" in line]
    assert len(told) > 1
    assert "waiting for h2 since " in told[-1]
