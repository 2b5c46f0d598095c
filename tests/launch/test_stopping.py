"""By which signals and by which file a run is asked to end."""

import errno
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.launch.stopping import StopRequests, heeded_signals

ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_TAKEN = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As they were."""
    numbers = (*ALWAYS, *UNLESS_TAKEN)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", UNLESS_TAKEN)
def test_a_closed_terminal_or_a_scheduler_ends_a_run_unless_it_is_ignored_or_a_library_listens(
    number: signal.Signals,
) -> None:
    """nohup ignores SIGHUP, and some have stacks printed at SIGUSR1, by a handler that is not Python's."""
    for other in UNLESS_TAKEN:
        signal.signal(other, signal.SIG_DFL)
    assert heeded_signals() == (*ALWAYS, *UNLESS_TAKEN)
    rest = (*ALWAYS, *(other for other in UNLESS_TAKEN if other is not number))
    signal.signal(number, signal.SIG_IGN)
    assert heeded_signals() == rest
    signal.signal(number, signal.SIG_DFL)
    faulthandler.register(number)
    try:
        assert heeded_signals() == rest
    finally:
        faulthandler.unregister(number)


def test_a_rank_under_nohup_goes_on(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requested = StopRequests(tmp_path / "stop")
    signal.raise_signal(signal.SIGHUP)
    assert requested() == 0


@pytest.mark.parametrize("number", [*ALWAYS, *UNLESS_TAKEN])
def test_a_signal_to_a_rank(tmp_path: Path, number: int) -> None:
    for other in UNLESS_TAKEN:
        signal.signal(other, signal.SIG_DFL)
    requested = StopRequests(tmp_path / "stop")
    assert requested() == 0
    signal.raise_signal(number)
    assert requested() == number


def test_what_another_one_takes_over_ends_no_run(tmp_path: Path) -> None:
    requested = StopRequests(tmp_path / "stop")
    assert not requested.taken_back(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert not requested.taken_back(signal.SIGINT)
    assert requested.taken_back(signal.SIGTERM)
    assert requested() == 0


def test_a_second_signal_ends_a_rank_unless_it_is_the_first_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    requested = StopRequests(tmp_path / "stop", ended.append)
    signal.raise_signal(signal.SIGINT)
    first = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: first + 0.1)
    signal.raise_signal(signal.SIGTERM)
    assert (requested(), ended) == (signal.SIGINT, [])
    monkeypatch.setattr(time, "monotonic", lambda: first + 5)
    signal.raise_signal(signal.SIGTERM)
    assert (requested(), ended) == (signal.SIGINT, [128 + signal.SIGTERM])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", "²".encode(), b"1 5"])
def test_what_is_no_number_asks_for_nothing(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "stop"
    requested = StopRequests(file)
    file.write_bytes(content)
    with requested.watched():
        time.sleep(0.6)
        assert requested() == 0
        file.write_text("15")
        assert heard(requested) == 15
    assert not watching()


def heard(requested: StopRequests) -> int:
    """Once it is."""
    for _ in range(200):
        if requested():
            break
        time.sleep(0.05)
    return requested()


def watching() -> bool:
    """Whether the thread goes on, once it has had time to end."""
    threads = [thread for thread in threading.enumerate() if thread.name == "hvd-lb stop file"]
    for thread in threads:
        thread.join(5)
    return any(thread.is_alive() for thread in threads)


def test_a_file_system_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, hangs, goes_on = tmp_path / "stop", threading.Event(), threading.Event()
    file.write_text("15")
    requested = StopRequests(file)
    read = Path.read_bytes

    def hanging(path: Path) -> bytes:
        hangs.set()
        goes_on.wait(20)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", hanging)
    with requested.watched():
        assert hangs.wait(5)
        assert requested() == 0
        goes_on.set()
        assert heard(requested) == 15
    assert not watching()


def test_a_file_that_cannot_be_read_just_now_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stop"
    file.write_text("15")
    requested = StopRequests(file)
    tried = threading.Event()

    def stale(*_: Any, **__: Any) -> bytes:
        tried.set()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    with requested.watched():
        assert tried.wait(5)
        assert requested() == 0
        monkeypatch.undo()
        assert heard(requested) == 15


EARLY = """
import json, os, signal, sys, types
from hvd_lb.launch import rank
from hvd_lb.launch.rank import entry
from hvd_lb.launch.stopping import stop_requests
rank.train = sys.modules["hvd_lb.launch.rank.train"] = types.ModuleType("train")
rank.train.main = lambda *given: print("asked by", stop_requests(None)(), "torch" in sys.modules)
entry.open_line = lambda: os.kill(os.getpid(), signal.SIGTERM)
entry.write_to = lambda log: None
entry.main(sys.argv[1])
"""


def test_a_rank_hears_a_signal_before_torch_is_loaded(tmp_path: Path) -> None:
    """Its loading takes seconds, in which a job that Slurm preempts was ended without a checkpoint."""
    job = {"environment": {}, "starter": "local", "hosts": [["localhost", 1]], "interfaces": {}, "pin": False}
    (tmp_path / "job.json").write_text(json.dumps({**job, "output": str(tmp_path), "device": "cpu"}))
    command = [sys.executable, "-c", EARLY, str(tmp_path / "job.json")]
    said = subprocess.run(
        command, env={**os.environ, "HOROVOD_RANK": "0"}, capture_output=True, text=True, check=True
    )
    assert said.stdout == "asked by 15 False\n"
