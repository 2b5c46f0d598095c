"""Members of an elastic job that fail, hang, or have notice to end; their head only notes what it is to tell."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from hvd_lb.launch.agent.generations import Generations
from hvd_lb.launch.agent.members import Host, Members

COMPUTES: dict[str, dict[str, Any]] = {
    "software": {"torch": "2.14.1"},
    "hardware": {"machine": "x86_64", "cpu_features": ["avx", "avx2"], "device": "cpu"},
}


class Connection:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, kind: str, body: bytes = b"", **fields: Any) -> None:
        self.sent.append(kind)


class Record:
    def ending(self, **fields: Any) -> None:
        pass


class Head:
    """Two ranks, on a host each if nothing is said."""

    def __init__(self, **ranks: set[int]) -> None:
        self.hosts = {name: Host(name, there) for name, there in (ranks or {"h1": {0}, "h2": {1}}).items()}
        for host in self.hosts.values():
            host.connection = Connection()  # type: ignore[assignment]
        self.table: dict[int, dict[str, Any]] = {
            rank: {"host": host.name} for host in self.hosts.values() for rank in host.ranks
        }
        self.waited_for: set[int] = set()
        self.values: dict[str, bytes] = {}
        self.record: Any = Record()
        self.failed = False
        self.signalled: list[tuple[int, int]] = []
        self.lost: list[str] = []
        self.notes: list[str] = []
        self.told: list[dict[str, Any]] = []  # the launching process

    def tell_agents(self, kind: str, body: bytes = b"", but: Host | None = None, **fields: Any) -> None:
        if kind == "signal":
            self.signalled.append((fields["rank"], fields["signal"]))

    def tell_control(self, **message: Any) -> None:
        self.told.append(message)

    def note(self, text: str) -> None:
        self.notes.append(text)

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
    return members_of(head)


def members_of(head: Head, least: int = 1, hang_timeout: int = 0, **job: Any) -> Members:
    environment = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "600", "HVD_LB_HANG_TIMEOUT": str(hang_timeout)}
    hosts = [[host.name, len(host.ranks)] for host in head.hosts.values()]
    return Members({"hosts": hosts, "min_processes": least, "environment": environment, **job}, head)


def test_the_launching_process_knows_at_once_who_is_lost() -> None:
    """While two wait for a third, as few as they are, nothing that the lost one has said counts against them."""
    head = Head(h1={0}, h2={1}, h3={2})
    members = members_of(head, least=3)
    for rank in range(3):
        members.told(rank)
    assert head.told == []
    head.hosts["h2"].ranks.clear()
    members.host_lost(head.hosts["h2"], [1], "its network went away")
    assert head.told == [{"members": {"0": "h1", "2": "h3"}}]
    members.word(0, "awaits", {"generation": 0, "step": 5, "unfinished": False})
    members.word(2, "awaits", {"generation": 0, "step": 5, "unfinished": False})
    assert "2 of 3 processes are left" in head.notes[-1]
    members.host_is_there(head.hosts["h2"], "another boot", COMPUTES)
    assert len(head.told) == 1
    members.word(3, "awaits", {"generation": -1, "step": -1, "unfinished": False})
    assert head.told[1:] == [{"members": {"0": "h1", "2": "h3", "3": "h2"}}]


@pytest.mark.parametrize("reproducible", [True, False])
def test_a_host_that_is_back_as_another_one_is_told_or_does_not_join(reproducible: bool) -> None:
    head = Head(h1={0}, h2={1})
    members = members_of(head, recipe={"reproducible": reproducible})
    host = head.hosts["h2"]
    members.host_is_there(host, "its boot", COMPUTES)
    host.ranks.clear()
    members.host_lost(host, [1], "its power went away")
    before = len(head.notes)
    newer = {**COMPUTES, "software": {"torch": "2.15.0"}}
    for _ in range(2):
        members.host_is_there(host, "another boot", newer)
    assert head.lost == ["h2", "h2"]
    assert head.notes[before:] == [
        "h2 does not join: it has other software than before (torch: 2.14.1 → 2.15.0)"
    ]
    assert host.ranks == set()
    older = {**COMPUTES["hardware"], "cpu_features": ["avx"]}
    members.host_is_there(host, "a third boot", {**COMPUTES, "hardware": older})
    assert host.ranks == {2}
    told = [note for note in head.notes if "h2 has other hardware than before (CPU without avx2)" in note]
    assert len(told) == reproducible


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(("status", "how"), [(-9, "SIGKILL"), (-40, "signal 40"), (-34, "SIGRTMIN")])
def test_one_that_is_ended_by_any_signal_is_lost(
    head: Head, members: Members, monkeypatch: pytest.MonkeyPatch, status: int, how: str
) -> None:
    lost: list[str] = []
    monkeypatch.setattr(Generations, "lose", lambda self, member, why: lost.append(why))
    members.ended(head.hosts["h2"], 1, status)
    assert lost == [f"rank 1 on h2 (ended by {how})"]


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
    members.host_is_there(host, "another boot", COMPUTES)
    assert not host.vacant
    assert sent(host)[-1] == "start"


def test_while_it_is_the_same_it_gets_no_ranks_for_an_hour(
    head: Head, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = head.hosts["h2"]
    members.host_is_there(host, "its boot", COMPUTES)
    members.go(host)
    head.end(members, 1)
    members.host_lost(host, [], "it had notice to end")
    members.host_is_there(host, "its boot", COMPUTES)
    assert (host.away, head.lost) == (True, ["h2"])
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    members.host_is_there(host, "its boot", COMPUTES)
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
    members.host_is_there(host, "its boot", COMPUTES)
    members.go(host)
    head.end(members, 1)
    members.host_lost(host, [], "it had notice to end")
    members.release(host)
    members.add(host, 1)
    members.host_is_there(host, "its boot", COMPUTES)
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


def test_a_lost_one_that_is_to_go_is_not_waited_for(head: Head, members: Members) -> None:
    host = head.hosts["h2"]
    host.ranks.clear()
    members.host_lost(host, [1], "its power")
    members.release(host)
    assert head.notes[-1] == "h2 is to go: it is not waited for any more"
    assert not members._generations.coming


def test_notice_after_the_end_of_the_run_is_nothing(head: Head, members: Members) -> None:
    for rank, host in enumerate(head.hosts.values()):
        host.ranks.clear()
        members.word(rank, "finished", {})
        members.ended(host, rank, 0)
        members.go(host)
        assert not host.going


def test_one_that_ends_with_exit_code_0_before_the_end_is_lost(head: Head) -> None:
    """Something in it has called exit."""
    members, host = members_of(head, least=2), head.hosts["h2"]
    host.ranks.clear()
    members.ended(host, 1, 0)
    assert not members._generations.finished
    assert members._generations._lost == ["rank 1 on h2 (exit code 0)"]
    assert sent(host)[0] == "start"


def test_a_newcomer_that_ends_before_it_has_joined_gets_a_successor_ever_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that are too few wait for three of them."""
    clock, head = Clock(monkeypatch), Head(h={0, 1})
    members, (host,) = members_of(head, least=2), head.hosts.values()

    def lose_newest() -> None:
        newest = max(host.ranks)
        host.ranks.discard(newest)
        members.ended(host, newest, -signal.SIGKILL)

    lose_newest()
    members.word(0, "awaits", {"generation": 0, "step": 9, "unfinished": False})
    assert sent(host) == ["start"]
    for times, seconds in enumerate((1, 2, 4), 1):
        lose_newest()
        assert f"another one is started there in {seconds} s" in head.notes[-1]
        clock.now += seconds - 0.1
        members.look()
        assert sent(host) == ["start"] * times
        clock.now += 0.2
        members.look()
        assert sent(host) == ["start"] * (times + 1)
    assert not [note for note in head.notes if "ends with a checkpoint" in note]
    lose_newest()
    assert "fewer than --min-processes 2: the run ends with a checkpoint" in head.notes[-1]


def test_a_host_whose_newcomer_has_joined_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, head = Clock(monkeypatch), Head(h={0, 1})
    members, (host,) = members_of(head), head.hosts.values()

    def lose(rank: int) -> None:
        host.ranks.discard(rank)
        members.ended(host, rank, -signal.SIGKILL)

    def awaits(rank: int, generation: int, step: int) -> None:
        members.word(rank, "awaits", {"generation": generation, "step": step, "unfinished": False})

    lose(1)
    awaits(0, 0, 9)
    lose(2)
    clock.now += 1
    members.look()
    awaits(3, -1, -1)
    awaits(0, 1, 10)
    lose(3)  # it had joined: there is another one at once
    lose(4)
    assert [note for note in head.notes if "before it had joined" in note] == [
        f"rank {rank} ended before it had joined (ended by SIGKILL) on h: another one is started there in 1 s"
        for rank in (2, 4)
    ]


def test_when_all_that_have_the_state_stand_still_the_job_ends_after_five_times_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, head = Clock(monkeypatch), Head(h={0, 1})
    members = members_of(head, hang_timeout=60)
    clock.now += 1000  # they load their libraries
    members.look()
    for rank in (0, 1):
        members.told(rank)
    clock.now += 299
    members.told(1)
    clock.now += 299
    members.look()
    assert head.signalled == []
    clock.now += 10_000
    members.were_stopped(10_000)  # with all others, as by Slurm
    members.look()
    assert head.signalled == []
    clock.now += 2
    members.look()
    assert head.signalled == [(0, signal.SIGKILL), (1, signal.SIGKILL)]


def test_a_newcomer_that_stands_still_while_it_loads_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has not spoken yet is waited for as at the start, and one that goes on speaking for as long."""
    clock, head = Clock(monkeypatch), Head(h={0, 1})
    members, (host,) = members_of(head, least=2, hang_timeout=60), head.hosts.values()

    def end(rank: int) -> None:
        host.ranks.discard(rank)
        members.ended(host, rank, -signal.SIGKILL)

    def look_after(seconds: float) -> list[int]:
        clock.now += seconds
        members.told(0)
        members.look()
        return [rank for rank, _ in head.signalled]

    end(1)
    members.word(0, "awaits", {"generation": 0, "step": 9, "unfinished": False})
    assert look_after(599) == []
    assert look_after(2) == [2]
    end(2)
    assert look_after(1) == [2]
    for _ in range(100):
        members.told(3)
        assert look_after(59) == [2]
    assert look_after(2) == [2, 3]
    assert head.notes[-1] == "rank 3 on h does not answer: it is taken out"
    end(3)
    look_after(2)
    members.word(4, "awaits", {"generation": -1, "step": -1, "unfinished": False})
    assert members._generations.members == [0, 4]


def test_one_that_was_killed_and_does_not_end_is_lost_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, head = Clock(monkeypatch), Head(h1={0}, h2={1, 2})
    members = members_of(head, hang_timeout=60)
    members.end_generation()
    members.word(0, "awaits", {"generation": 0, "step": 9, "unfinished": False})
    for times in (1, 2):
        clock.now += 61
        members.look()
        assert [rank for rank, _ in head.signalled] == [1, 2]
        assert head.lost == ["h2"] * 2 * (times - 1)


def test_one_that_is_to_have_fewer_keeps_its_first_places(head: Head, members: Members) -> None:
    """Who leaves is asked once, and nobody takes its place."""
    host = head.hosts["h2"]
    members._most = 9
    members.add(host, 4)
    assert sent(host) == ["start"] * 3  # members 2, 3 and 4
    for member in (2, 3):
        members.word(member, "awaits", {"generation": -1, "step": -1, "unfinished": False})
    for member, step in ((0, 5), (1, 5)):
        members.word(member, "awaits", {"generation": 0, "step": step, "unfinished": False})
    members.add(host, 3)
    assert head.signalled == [(4, signal.SIGKILL)]  # it has not joined
    members.add(host, 1)
    assert head.signalled[1:] == [(2, signal.SIGTERM), (3, signal.SIGTERM)]
    head.end(members, 2)
    host.ranks.discard(4)
    members.ended(host, 4, -signal.SIGKILL)
    host.ranks.discard(3)
    members.ended(host, 3, 1)  # crashed on its way
    assert (host.vacant, sent(host)) == ([], ["start"] * 3)
    members.release(host)
    assert head.signalled[3:] == [(1, signal.SIGTERM)]
    members.add(host, 2)
    assert len(host.vacant) + sent(host).count("start") == 3 + 2
