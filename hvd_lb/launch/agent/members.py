"""The members of an elastic job, for its head: `generations` says what is to be done, and this does it.

A lost rank gets a successor on its host: at once, or ever more seldom where that ends before it has joined. A lost host
gets new ranks when it is back.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hvd_lb.exact.rounding import rounding_differences
from hvd_lb.launch.agent.connection import Connection, Patience
from hvd_lb.launch.agent.generations import Ask, Begin, Dismiss, Generations, GiveUp, Over, Wait
from hvd_lb.launch.agent.places import numbered, ranks_by_host
from hvd_lb.launch.agent.record import Record
from hvd_lb.launch.options import HANG_TIMEOUT, START_TIMEOUT
from hvd_lb.machine.process import signal_name

_WRONG = 2  # the exit status of a rank whose failure others would repeat
_LOADING_SECONDS = 30.0  # a process that begins anew says nothing while it loads its libraries
# A host that had notice to end, and has not ended for so long, does not end: its notice was taken back.
_NOTICE_SECONDS = 3600.0
# Until another newcomer is started after the first that has ended before it joined; twice as long after the next.
_AGAIN_SECONDS, _MOST_AGAIN_SECONDS = 1.0, 60.0
_WAITED_FOR = 3  # so many of them those wait who are too few
_ALL_HANG = 5  # times the timeout, until no other than all who have the state is thought to stand still


@dataclass
class Failed:
    """Places of a host whose newcomers have ended before they joined."""

    places: list[int] = field(default_factory=list)
    times: int = 0
    again_at: float = math.inf


@dataclass
class Host:
    """A host of a job, as its head sees it."""

    name: str
    ranks: set[int]  #: that have not ended
    connected: asyncio.Event = field(default_factory=asyncio.Event)  #: or lost before it was
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    connection: Connection | None = None
    # Of an elastic job:
    away: bool = False  #: lost, and tried again
    vacant: list[int] = field(default_factory=list)  #: places that are filled when it is back
    refused: str = ""  #: why, when it was back
    life: str = ""  #: its boot, or the start of its container
    computes: dict[str, dict[str, Any]] = field(default_factory=dict)  #: its software and hardware at first
    going: bool = False  #: it has notice to end; until it is back in another life
    noticed_at: float = 0.0
    settled: bool = False  #: one of its processes has joined since it was lost
    wanted: asyncio.Event = field(default_factory=asyncio.Event)  #: it may have processes
    interface: str = ""  #: by which it reaches the others, where the job does not say it


class Holder(Protocol):
    """What of a head its members need."""

    hosts: dict[str, Host]
    table: dict[int, dict[str, Any]]  #: what is known of each rank
    waited_for: set[int]
    values: dict[str, bytes]  #: of the rendezvous
    record: Record
    failed: bool

    def tell_agents(self, kind: str, body: bytes = b"", but: Host | None = None, **fields: Any) -> None: ...
    def tell_control(self, **message: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def lose(self, host: Host, why: str) -> None: ...
    def stop(self, grace: float = ...) -> None: ...


class Members:
    """All methods are told what has happened, and return when what follows from it has been sent."""

    def __init__(self, job: Mapping[str, Any], head: Holder):
        self._head = head
        where = {rank: host.name for host in head.hosts.values() for rank in sorted(host.ranks)}
        self._generations = Generations(where, job["min_processes"])
        places = ranks_by_host(job["hosts"])
        self._reproducible = job.get("recipe", {}).get("reproducible", False)
        self._slots = {name: len(there) for name, there in places.items()}
        self._most = job.get("max_processes") or len(where)
        self._place = {rank: rank - there.start for there in places.values() for rank in there}
        self._failed: dict[str, Failed] = {}
        self._leaving: set[int] = set()
        # At the end of the run. Who ends without a word is lost, also with exit code 0.
        self._finished: set[int] = set()
        self._asked: set[int] = set()  # to leave
        self._wrong: set[int] = set()  # members that have computed wrongly
        self._barred: set[tuple[str, int]] = set()  # their places, by host, which stay empty
        self._since = 0.0  # when the present generation was found to be over, or newcomers were there
        self._timeout = float(job["environment"][START_TIMEOUT])
        self._hang = float(job["environment"].get(HANG_TIMEOUT, 0))
        self._started_at: dict[int, float] = {}  # newcomers
        self._heard_at: dict[int, float] = {}  # when a member has said last what it does
        self._killed: set[int] = set()  # as they did not answer
        self._waits_until = math.inf  # for hosts that are away, as too few are left
        self._seen = set(head.hosts)
        self._told_control = {str(rank): name for rank, name in where.items()}  # from the job's file
        for host in head.hosts.values():
            host.wanted.set()
        self.patience = Patience.of_elastic(self._hang)

    def told(self, rank: int) -> None:
        """It has said what it does."""
        self._heard_at[rank] = time.monotonic()

    def word(self, member: int, kind: str, values: dict[str, Any]) -> None:
        """What a member says of itself."""
        if kind == "leaving":
            self._leaving.add(member)
        elif kind == "finished":
            self._finished.add(member)
        elif kind == "notice":
            print(f"{self._named(member)} has heard that it is to leave", flush=True)
            self._generations.notice(member)
            self._go_on()
        elif kind == "begun":
            self._generations.begun(values["generation"])
        elif kind == "wrong":
            self._bar(values["members"])
        else:
            if member in self._generations.newcomers:
                print(f"{self._named(member)} is ready to join", flush=True)
            self._generations.ready(member, **values)
            self._go_on()

    def _named(self, member: int) -> str:
        return f"rank {member} on {self._head.table[member]['host']}"

    def _bar(self, members: list[int]) -> None:
        """These have computed wrongly, as the others say: nobody takes their places."""
        for member in {*members} - self._wrong:
            host = self._head.table[member]["host"]
            self._wrong.add(member)
            self._barred.add((host, self._place[member]))
            self._head.note(
                f"rank {member} on {host} computed wrongly and is taken out; its place there stays empty in this job"
            )

    def end_run(self, number: int) -> None:
        """It has been asked to end by this signal. Who takes steps hears it from a file; who waits hears it by this."""
        self._generations.stop(number)
        self._go_on()

    def end_generation(self) -> None:
        """Its members wait for each other in vain: they give up the present step, and connect anew."""
        print("the ranks wait for each other in vain: they connect anew", flush=True)
        self._generations.end()
        self._go_on()

    def ended(self, host: Host, member: int, status: int) -> None:
        """Its process has ended."""
        head, generations = self._head, self._generations
        if head.failed:
            return
        had_joined = member in generations.members
        if status == _WRONG and had_joined:
            head.record.ending(wrong=member)
            head.stop()
        elif status == 0 and member in self._leaving:
            why = " (computed wrongly)" if member in self._wrong else ""
            generations.leave(member, f"rank {member} on {host.name}{why}")
            if host.going and self._is_wanted(host, member):
                host.vacant.append(self._place[member])
            self._fill()
        elif status == 0 and member in self._finished:
            generations.finish(member)
            for newcomer in generations.newcomers:
                head.tell_agents("signal", signal=signal.SIGKILL, rank=newcomer)
        else:
            how = f"exit code {status}" if status >= 0 else f"ended by {signal_name(-status)}"
            generations.lose(member, f"rank {member} on {host.name} ({how})")
            wanted = self._is_wanted(host, member)
            if host.going and wanted:
                host.vacant.append(self._place[member])
            elif had_joined and host.connection and wanted and not generations.finished:
                self._start(host, self._place[member])
            elif wanted and not generations.finished:
                self._not_joined(host, member, how)
        if (host.going or not host.wanted.is_set()) and not host.ranks and host.connection:
            host.connection.send("end")
        self._go_on()

    def _not_joined(self, host: Host, member: int, how: str) -> None:
        """A newcomer has ended: there is another one later, on a host without others when that has been tried again."""
        failed = self._failed.setdefault(host.name, Failed())
        failed.places.append(self._place[member])
        why = f"rank {member} ended before it had joined ({how})"
        if not host.ranks and len(self._head.hosts) > 1:
            self._head.lose(host, why)
            return
        seconds = min(_AGAIN_SECONDS * 2**failed.times, _MOST_AGAIN_SECONDS)
        failed.times, failed.again_at = failed.times + 1, time.monotonic() + seconds
        if failed.times <= _WAITED_FOR:
            self._generations.coming.add(host.name)
        self._head.note(f"{why} on {host.name}: another one is started there in {seconds:.0f} s")

    def _fill_again(self, host: Host, failed: Failed, now: float) -> None:
        """Where newcomers have ended, if it is time."""
        if failed.places and now >= failed.again_at and not (host.away or host.going):
            host.vacant += failed.places
            failed.places = []
            self._generations.coming.discard(host.name)
            self._fill()
            self._go_on()

    def host_lost(self, host: Host, ranks: list[int], why: str) -> None:
        """With these ranks; it is tried again from now on."""
        host.away = True
        host.vacant += self._failed.pop(host.name, Failed()).places
        for rank in ranks:
            self._head.waited_for.discard(rank)
            if self._is_wanted(host, rank):
                host.vacant.append(self._place[rank])
            of_all = f"{numbered(ranks)} on {host.name} ({why})"
            self._generations.lose(rank, of_all if rank == ranks[0] else "")
        if not self._head.failed and not self._generations.finished and host.wanted.is_set():
            self._generations.coming.add(host.name)
            back = "has been started anew" if host.going else "answers"
            self._head.note(f"{host.name} is lost ({why}); it is tried again, and joins when it {back}")
        self._fill()
        self._go_on()

    def host_is_there(self, host: Host, life: str, computes: dict[str, dict[str, Any]]) -> None:
        """Its agent is connected; on a host that was away its ranks are started again.

        Not while one that had notice is still the same: it may go at any moment, and is only tried again. Nor where
        another one has its name that `computes` by other software. Other hardware is told.
        """
        before, host.life = host.life, life
        host.computes = host.computes or computes
        if not host.away:
            return
        if host.going and life == before and time.monotonic() < host.noticed_at + _NOTICE_SECONDS:
            self._head.lose(host, "it had notice to end, and has not been started anew")
            return
        if other := rounding_differences(host.computes["software"], computes["software"]):
            why = f"it has other software than before ({'; '.join(other)})"
            if why != host.refused:
                self._head.note(f"{host.name} does not join: {why}")
            host.refused = why
            self._head.lose(host, why)
            return
        host.away = host.going = False
        self._generations.coming.discard(host.name)
        if self._generations.finished:
            return
        other = rounding_differences(host.computes["hardware"], computes["hardware"])
        if other and self._reproducible:
            self._head.note(
                f"{host.name} has other hardware than before ({'; '.join(other)}), which may compute other bits, and "
                "then so does this run: `hvd-lb doctor --selftest --hosts …` tells"
            )
        started = self._fill()
        self._head.note(
            f"{host.name} is {'back' if host.name in self._seen else 'there'}: {started:,} starting there"
        )
        self._seen.add(host.name)

    def add(self, host: Host, slots: int) -> None:
        """It may have so many processes from now on; those in further places leave after the present step."""
        before = self._slots.get(host.name, 0) if host.wanted.is_set() else 0
        host.going = host.going and host.wanted.is_set()  # whoever names it again knows that it stays
        self._slots[host.name] = slots
        if not (host.away or host.going):
            self._generations.coming.discard(host.name)
        host.vacant += self._failed.pop(host.name, Failed()).places
        host.vacant[:] = [place for place in host.vacant if place < slots]
        host.vacant += [place for place in range(before, slots) if (host.name, place) not in self._barred]
        host.wanted.set()
        beyond = [rank for rank in sorted(host.ranks) if self._place[rank] >= slots]
        if slots < before and beyond and not host.going:
            self._head.note(
                f"{host.name} takes {slots:,} now, before {before:,}: others leave after the present step"
            )
            self._ask_to_leave(beyond)
        if host.connection:
            self._fill()

    def give_up(self, host: Host, why: str) -> None:
        """It is away, and not tried again."""
        self._forget(host)
        self._head.note(f"{host.name} does not come back: {why}")
        self._go_on()

    def _forget(self, host: Host) -> None:
        """It gets no processes any more."""
        host.wanted.clear()
        host.vacant.clear()
        self._failed.pop(host.name, None)
        self._generations.coming.discard(host.name)

    def release(self, host: Host) -> None:
        """It is not to have processes any more: see `_send_away`."""
        self._forget(host)
        what = "its processes leave after the present step" if host.ranks else "it is not waited for any more"
        self._head.note(f"{host.name} is to go: {what}")
        if not host.going:  # else they are asked already, and asked twice they would end at once
            self._send_away(host)

    def go(self, host: Host, *, told: bool = False) -> None:
        """It has notice to end, and may come back: then there are processes in the same places again.

        `told`: so have its processes, by whoever told it.
        """
        if host.going or not host.wanted.is_set() or self._head.failed or self._generations.finished:
            return
        host.going, host.noticed_at = True, time.monotonic()
        self._generations.coming.add(host.name)
        self._head.note(f"{host.name} has notice to end: its processes leave after the present step")
        self._send_away(host, told=told)

    def _is_wanted(self, host: Host, member: int) -> bool:
        """Whether another one may take its place there."""
        place = self._place[member]
        return (
            host.wanted.is_set() and place < self._slots[host.name] and (host.name, place) not in self._barred
        )

    def _send_away(self, host: Host, *, told: bool = False) -> None:
        """As `_ask_to_leave`, all of its processes, and its agent."""
        if not host.ranks and host.connection:
            host.connection.send("end")
        self._ask_to_leave(sorted(host.ranks), told=told)

    def _ask_to_leave(self, ranks: Sequence[int], *, told: bool = False) -> None:
        """These are to leave after the present step; those that have not joined end at once."""
        for rank in ranks:
            joined = rank in self._generations.members
            if rank not in self._asked and not (joined and told):  # asked twice it would end at once
                self._head.tell_agents(
                    "signal", signal=signal.SIGTERM if joined else signal.SIGKILL, rank=rank
                )
            self._asked.add(rank)
        self._go_on()

    def _fill(self) -> int:
        """Start processes in vacant places, as far as there may be more; how many."""
        started = 0
        for host in self._head.hosts.values():
            while (
                host.connection
                and not host.away
                and not host.going
                and host.vacant
                and len(self._generations.hosts) < self._most
            ):
                self._start(host, host.vacant.pop(0))
                started += 1
        return started

    def were_stopped(self, seconds: float) -> None:
        """The head did not run for so long, and nobody did anything for which he is waited for."""
        self._since += seconds
        self._waits_until += seconds
        for times in (self._heard_at, self._started_at):
            times.update({member: at + seconds for member, at in times.items()})
        for failed in self._failed.values():
            failed.again_at += seconds

    def look(self) -> None:
        """Now and then: whether somebody is waited for who will not come."""
        now = time.monotonic()
        if self._head.failed:
            return
        for name, failed in list(self._failed.items()):
            self._fill_again(self._head.hosts[name], failed, now)
        if self._hang:
            for member in self._generations.awaited:
                self._take_out(member, now)
            for newcomer in self._generations.loading:
                self._take_out_newcomer(newcomer, now)
            self._look_whether_all_hang(now)
        if now > self._waits_until:
            self._waits_until = math.inf
            self._generations.coming.clear()
            self._go_on()

    def _take_out(self, member: int, now: float) -> None:
        """Kill a member for which the others wait, if it stands still, or hangs while it does something else."""
        known = self._head.table[member]
        silent = now - max(self._since, self._heard_at.get(member, 0.0))
        hangs = known.get("stage", {}).get("hangs") and now - self._since > self._hang
        if hangs or silent > max(self._hang, _LOADING_SECONDS):
            self._kill(member, now)

    def _take_out_newcomer(self, newcomer: int, now: float) -> None:
        """Kill one that stands still while it loads. One that says that it is loading may take long."""
        heard = self._heard_at.get(newcomer)
        patience = max(self._hang, _LOADING_SECONDS) if heard else self._timeout
        if now - (heard or self._started_at[newcomer]) > patience:
            self._kill(newcomer, now)

    def _look_whether_all_hang(self, now: float) -> None:
        """Nobody is there then to say that he waits for others: the job ends, and can be started again."""
        members = list(self._generations.members)
        # Who has said nothing yet loads its libraries.
        heard = [self._heard_at.get(member, math.inf) for member in members]
        if now - max([self._since, *heard]) > _ALL_HANG * max(self._hang, _LOADING_SECONDS):
            for member in members:
                self._kill(member, now)

    def _kill(self, member: int, now: float) -> None:
        """Once; one that is still there after as long again hangs in a driver, say, and is lost with its host."""
        if member not in self._generations.hosts:  # lost just now, with another one of its host
            return
        host = self._generations.hosts[member]
        if member in self._killed:
            self._head.lose(self._head.hosts[host], f"rank {member} there was killed, and does not end")
            return
        self._killed.add(member)
        self._head.note(f"rank {member} on {host} does not answer: it is taken out")
        self._heard_at[member] = now
        self._head.tell_agents("signal", signal=signal.SIGKILL, rank=member)

    def _start(self, host: Host, place: int) -> None:
        """Start a newcomer in a place of a host."""
        assert host.connection is not None
        newcomer, slots = len(self._head.table), self._slots[host.name]
        self._place[newcomer], self._started_at[newcomer] = place, time.monotonic()
        self._head.table[newcomer] = {"host": host.name}
        host.ranks.add(newcomer)
        self._generations.start(newcomer, host.name)
        host.connection.send("start", member=newcomer, slot=place, slots=slots)

    def _go_on(self) -> None:
        """Do what the generations say is to be done."""
        head, generations = self._head, self._generations
        while not head.failed and (order := generations.order()):
            match order:
                case Over(generation):
                    self._since = time.monotonic()
                    head.tell_agents("over", generation=generation, members=list(generations.members))
                    # Values of the rendezvous that an agent puts from now on are of later generations.
                    head.values.clear()
                case Ask(member):
                    head.tell_agents("ask", member=member)
                case Wait(why):
                    self._waits_until = time.monotonic() + self._timeout
                    head.note(why)
                case Dismiss(leaving):
                    for member in leaving:
                        head.tell_agents("dismiss", member=member)
                case Begin():
                    self._begin(order)
                case GiveUp(why):
                    head.record.ending(gave_up=why)
                    head.stop(0.0)
        self._tell_control()

    def _tell_control(self) -> None:
        """Who trains, where that has changed. A lost one may have left a report that it waits for the others: by that
        they would hang, as long as they wait for the next generation."""
        there = {str(member): self._generations.hosts[member] for member in self._generations.members}
        if there and there != self._told_control:
            self._told_control = there
            self._head.tell_control(members=there)

    def _begin(self, begin: Begin) -> None:
        head = self._head
        now = sum(len(there) for _, there in begin.hosts)
        self._waits_until = math.inf
        for name, _ in begin.hosts:
            head.hosts[name].settled = True
            if (failed := self._failed.get(name)) and not failed.places:
                del self._failed[name]
        head.record.ending(generation=begin.generation, processes=now)
        change = {
            "before": begin.before,
            "processes": now,
            "lost": begin.lost,
            "left": begin.left,
            "joined": begin.joined,
            "seconds": time.monotonic() - self._since,
        }
        if begin.gives_up:
            head.record.ending(gave_up=begin.gives_up)
            head.note(f"{begin.gives_up}: the run ends with a checkpoint")
        head.tell_agents(
            "begin",
            generation=begin.generation,
            hosts=begin.hosts,
            ends=begin.ends,
            gives_up=begin.gives_up,
            change=change,
        )
        print(
            f"generation {begin.generation}: {begin.hosts}; lost: {begin.lost}, left: {begin.left}",
            flush=True,
        )
