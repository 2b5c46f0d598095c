"""Hosts of an elastic job that have notice to end, with a head that only notes what it is to tell."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from hvd_lb.launch.agent.members import Host, Members


class Connection:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, kind: str, body: bytes = b"", **fields: Any) -> None:
        self.sent.append(kind)


class Record:
    def ending(self, **fields: Any) -> None:
        pass


class Head:
    """Two hosts with a rank each."""

    def __init__(self) -> None:
        self.hosts = {name: Host(name, {rank}) for rank, name in enumerate(("h1", "h2"))}
        for host in self.hosts.values():
            host.connection = Connection()  # type: ignore[assignment]
        self.table: dict[int, dict[str, Any]] = {rank: {"host": name} for rank, name in enumerate(self.hosts)}
        self.waited_for: set[int] = set()
        self.values: dict[str, bytes] = {}
        self.record: Any = Record()
        self.failed = False
        self.signalled: list[tuple[int, int]] = []
        self.lost: list[str] = []

    def tell_agents(self, kind: str, body: bytes = b"", but: Host | None = None, **fields: Any) -> None:
        if kind == "signal":
            self.signalled.append((fields["rank"], fields["signal"]))

    def tell_control(self, **message: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def lose(self, host: Host, why: str) -> None:
        self.lost.append(host.name)

    def stop(self, grace: float = 0.0) -> None:
        self.failed = True

    def end(self, members: Members, rank: int) -> None:
        """The rank says that it leaves, and its process ends."""
        host = self.hosts[self.table[rank]["host"]]
        members.word(rank, "leaving", {})
        host.ranks.discard(rank)
        members.ended(host, rank, 0)


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.fixture
def members(head: Head) -> Members:
    environment = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "600"}
    job = {"hosts": [["h1", 1], ["h2", 1]], "min_processes": 1, "environment": environment}
    return Members(job, head)


def sent(host: Host) -> list[str]:
    connection: Any = host.connection
    return list(connection.sent)


def test_its_ranks_are_asked_once_and_its_places_are_kept_for_its_return(
    head: Head, members: Members
) -> None:
    host = head.hosts["h2"]
    members.go(host)
    members.go(host)
    assert head.signalled == [(1, signal.SIGTERM)]
    head.end(members, 1)
    assert host.vacant == [0]
    assert sent(host) == ["end"]  # and nothing is started there
    members.host_lost(host, [], "it had notice to end")
    members.host_is_there(host, "another boot")
    assert not host.vacant
    assert sent(host)[-1] == "start"


def test_while_it_is_the_same_it_gets_no_ranks_for_an_hour(
    head: Head, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = head.hosts["h2"]
    members.host_is_there(host, "its boot")
    members.go(host)
    head.end(members, 1)
    members.host_lost(host, [], "it had notice to end")
    members.host_is_there(host, "its boot")
    assert (host.away, head.lost) == (True, ["h2"])
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    members.host_is_there(host, "its boot")
    assert not host.away
    assert sent(host) == ["end", "start"]


def test_one_whose_ranks_are_told_by_others_gets_no_further_ones(head: Head, members: Members) -> None:
    """As Slurm tells all that it is about to end, and newcomers die of it."""
    host = head.hosts["h2"]
    members.go(host, told=True)
    assert not head.signalled
    head.end(members, 1)
    assert (host.vacant, sent(host)) == ([0], ["end"])


def test_one_that_is_named_again_stays(head: Head, members: Members) -> None:
    host = head.hosts["h2"]
    members.host_is_there(host, "its boot")
    members.go(host)
    head.end(members, 1)
    members.host_lost(host, [], "it had notice to end")
    members.release(host)
    members.add(host, 1)
    members.host_is_there(host, "its boot")
    assert sent(host)[-1] == "start"


@pytest.mark.parametrize("released_first", [True, False])
def test_one_that_is_not_wanted_any_more_keeps_no_places(
    head: Head, members: Members, released_first: bool
) -> None:
    """A second SIGTERM would end its ranks in the middle of a step."""
    host = head.hosts["h2"]
    for do in (members.release, members.go) if released_first else (members.go, members.release):
        do(host)
    assert head.signalled == [(1, signal.SIGTERM)]
    head.end(members, 1)
    assert host.vacant == []
    assert sent(host) == ["end"]
    members.add(host, 1)
    assert len(host.vacant) + sent(host).count("start") == 1


def test_one_without_ranks_has_nothing_to_wait_for(head: Head, members: Members) -> None:
    host = head.hosts["h2"]
    host.ranks.clear()
    members.go(host)
    assert sent(host) == ["end"]


def test_notice_after_the_end_of_the_run_is_nothing(head: Head, members: Members) -> None:
    for rank, host in enumerate(head.hosts.values()):
        host.ranks.clear()
        members.ended(host, rank, 0)
        members.go(host)
        assert not host.going
