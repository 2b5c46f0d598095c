"""Hosts that a script prints, asked again and again."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence, Set
from pathlib import Path

import pytest
from real_runs import processes_of, until

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.preflight.ask import ask_all
from hvd_lb.launch.preflight.discovery import Come, Discovery, Examined, Gone, discovered


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "hosts.sh"
    file.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    file.chmod(0o755)
    return file


def says(script: Path, text: str) -> None:
    (script.parent / "hosts").write_text(text)


def hangs(script: Path) -> None:
    """In a process that it has started, which names it, and notices no reader that is gone."""
    script.write_text(f"#!/bin/sh\n{sys.executable} -c 'import time; time.sleep(600)' {script}\necho h1\n")


def all_ready(hosts: Sequence[Host], new: Set[str], *_: object) -> Examined:
    return [Come(host.name, host.slots or 1, "eth0") for host in hosts if host.name in new], {}


def test_what_it_prints_are_hosts(script: Path) -> None:
    says(script, "h1:2\nh2 slots=3  # a comment\n\n")
    assert discovered(script) == [Host("h1", 2), Host("h2", 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/sh\necho no network >&2; exit 3\n", "hosts.sh failed: no network"),
        ("#!/bin/sh\nexit 3\n", "hosts.sh failed: exit code 3"),
        ("#!/bin/sh\n", "hosts.sh names no host"),
        ("#!/bin/sh\necho 'h1;touch pwned'\n", "is not a host"),
        ("#!/no/such/shell\n", "hosts.sh cannot be run"),
    ],
)
def test_a_script_that_fails_is_an_error_in_one_line(script: Path, text: str, words: str) -> None:
    script.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        discovered(script)
    assert "\n" not in str(error.value)


def test_one_that_does_not_end_is_ended_with_all_that_it_has_started(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_lb.launch.preflight.discovery._PATIENCE_SECONDS", 0.5)
    hangs(script)
    with pytest.raises(UserError, match="has not ended after 0 s"):
        discovered(script)
    until(lambda: not processes_of(script), 10)


def test_the_end_of_a_run_ends_it_too(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_lb.launch.preflight.discovery._EVERY_SECONDS", 0.0)
    hangs(script)
    with Discovery(script, {"h1": 1}, lambda *_: ([], {})):
        until(lambda: len(processes_of(script)) > 1, 10)
    until(lambda: not processes_of(script), 10)


def test_so_does_the_death_of_the_launching_process(script: Path) -> None:
    script.write_text(f"#!/bin/sh\nexec tail -f {script}\n")
    ask = "import pathlib, sys; from hvd_lb.launch.preflight.discovery import *; discovered(pathlib.Path(sys.argv[1]))"
    asking = subprocess.Popen([sys.executable, "-c", ask, str(script)])
    until(lambda: len(processes_of(script)) > 1)
    asking.kill()
    asking.wait()
    until(lambda: not processes_of(script), 10)


def test_hosts_come_and_go_and_problems_are_told_once(script: Path) -> None:
    asked: list[list[str]] = []
    not_ready = {"h3": "no hvd-lb there"}

    def examine(hosts: Sequence[Host], new: Set[str], *_: object) -> Examined:
        asked.append(sorted(new))
        return all_ready(hosts, new - not_ready.keys())[0], {
            name: not_ready[name] for name in new & not_ready.keys()
        }

    discovery = Discovery(script, {"h1": 1}, examine)
    says(script, "h1:1\nh2:2\nh3:1\n")
    discovery.look()
    assert discovery.news() == [Come("h2", 2, "eth0"), "h3 cannot join: no hvd-lb there"]
    discovery.look()
    assert discovery.news() == []  # h3 is asked again, and nothing is new
    (script.parent / "hosts").unlink()
    for _ in range(2):
        discovery.look()
    (failed,) = discovery.news()
    assert "No such file" in str(failed)
    assert "the hosts stay as they are" in str(failed)
    not_ready.clear()
    says(script, "h3:1\nh2:2\n")
    discovery.look()
    assert discovery.news() == [Gone("h1"), Come("h3", 1, "eth0")]
    says(script, "h3:1\nh2:2\nh1:1\n")
    discovery.look()
    assert discovery.news() == [Come("h1", 1, "eth0")]
    says(script, "h3:1\nh2:4\nh1:1\n")
    discovery.look()
    assert discovery.news() == [Come("h2", 4, "eth0")]  # more places than before
    says(script, "h3\nh2\nh1\n")
    discovery.look()
    assert discovery.news() == []  # not said how many: as it was
    says(script, "h3:1\nh2:1\nh1:1\n")
    discovery.look()
    assert discovery.news() == [Come("h2", 1, "")]  # fewer, of which nothing has to be known
    says(script, "h3:1\nh2:3\nh1:1\n")
    discovery.look()
    assert discovery.news() == [Come("h2", 3, "eth0")]
    assert asked == [["h2", "h3"], ["h3"], ["h3"], ["h1"], ["h2"], ["h2"]]


def test_one_that_does_not_answer_keeps_nobody_from_leaving(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_lb.launch.preflight.discovery._EVERY_SECONDS", 0.05)
    answers = threading.Event()

    def examine(hosts: Sequence[Host], new: Set[str], *_: object) -> Examined:
        answers.wait()
        return all_ready(hosts, new)

    discovery = Discovery(script, {"h1": 1, "h2": 2}, examine)
    says(script, "h1:1\nh2:4\nh3:1\nh4:1\n")
    discovery.look()
    says(script, "h2:2\nh3:1\n")
    discovery.look()
    assert discovery.news() == [Gone("h1")]
    answers.set()
    news: list[object] = []
    until(lambda: discovery.look() or news.extend(discovery.news()) or news, 10)
    assert news == [Come("h3", 1, "eth0")]  # h4 is not named any more, nor so many places of h2


def test_whatever_goes_wrong_is_told_and_the_script_is_asked_again(script: Path) -> None:
    failures: list[Exception] = [UserError("disk is full"), OSError(11, "no processes"), KeyError("cpu")]

    def examine(hosts: Sequence[Host], new: Set[str], *_: object) -> Examined:
        if failures:
            raise failures[0]
        return all_ready(hosts, new)

    discovery = Discovery(script, {"h1": 1}, examine)
    says(script, "h1:1\nh2:1\n")
    while failures:
        for _ in range(2):
            discovery.look()
        (told,) = discovery.news()
        assert "; the hosts stay as they are" in str(told)
        assert str(failures.pop(0)) in str(told)
    discovery.look()
    assert discovery.news() == [Come("h2", 1, "eth0")]


def test_answers_that_are_no_text_are_answers() -> None:
    """Of a login shell's greeting, say."""
    said = ask_all({"h1": ["printf", r"\377 hello"]}, "", 30)["h1"]
    assert said is not None
    assert said.stdout == "\ufffd hello"


def test_the_end_of_a_run_waits_for_no_host(script: Path) -> None:
    """In a process of its own: what it waits for at its end counts, too."""
    says(script, "h1:1\nh2:1\n")
    program = """
import pathlib, sys, threading
from hvd_lb.launch.preflight import discovery
from hvd_lb.launch.preflight.ask import ask_all
discovery._EVERY_SECONDS = 0.1
over, asked = threading.Event(), threading.Event()

def examine(*_):
    asked.set()
    ask_all({"h2": ["sleep", "600"]}, "", 600, over)

with discovery.Discovery(pathlib.Path(sys.argv[1]), {"h1": 1}, examine, over):
    asked.wait()
"""
    subprocess.run([sys.executable, "-c", program, str(script)], check=True, timeout=120)
