"""Hosts that a script prints, asked again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.preflight.discovery import Come, Discovery, Gone, discovered


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "hosts.sh"
    file.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    file.chmod(0o755)
    return file


def says(script: Path, text: str) -> None:
    (script.parent / "hosts").write_text(text)


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


def test_one_that_does_not_end(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_lb.launch.preflight.discovery._PATIENCE_SECONDS", 0.2)
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(UserError, match="has not ended after 0 s"):
        discovered(script)


def test_hosts_come_and_go_and_problems_are_told_once(script: Path) -> None:
    asked: list[list[str]] = []
    not_ready = {"h3": "no hvd-lb there"}

    def examine(hosts: Sequence[Host], new: set[str]) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
        asked.append(sorted(new))
        ready = {
            host.name: (host.slots or 1, "eth0") for host in hosts if host.name in new - not_ready.keys()
        }
        return ready, {name: not_ready[name] for name in new if name in not_ready}

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
    assert asked == [["h2", "h3"], ["h3"], ["h3"], ["h1"], ["h2"]]
