"""The head of a job: `python -P -m hvd_lb.launch.agent.head JOB.json ADDRESS each|nodes|all [COMMAND…]`.

It listens on ADDRESS, has an agent started on each host, and holds the job together: what one agent publishes for the
rendezvous goes to all; when a rank fails or a host is lost, all are ended; the exit status is 0 when all ranks ended
well. `each` starts agents one by one, with COMMAND (ssh …) in front where the host is another machine, `nodes` with
COMMAND (srun …) in front for every host; `all` runs COMMAND (srun …) once, which starts one agent on every host.

The launching process, if there is one, holds the other end of a socket (`CONTROL`): lines of JSON, downwards
{"signal": 10, "rank": 3 or null} and {"stop": true}, of an elastic job also {"ends": 15}, {"again": true},
{"come": "h4", "slots": 2, "interface": "eth0"} and {"gone": "h2"}; upwards {"note": "for a person"} and
{"members": {"3": "h1"}}. When it is gone, the job is ended. Then signals to this process are ignored: the launching
process decides what becomes of them.

In an elastic job a lost rank or host ends none of the others: they make the next generation (`generations`), and where
a rank was lost on a host that is there another is started, which joins. A lost host is tried again, ever more seldom,
and gets new ranks when it answers.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hvd_lb.launch.agent.connection import ConnectionLost, Patience, answer
from hvd_lb.launch.agent.logins import LOGIN_TRIES, Logins, taken_out
from hvd_lb.launch.agent.members import Host, Members
from hvd_lb.launch.agent.places import name_ranks, ranks_by_host
from hvd_lb.launch.agent.process import allow_open_files
from hvd_lb.launch.agent.record import Record
from hvd_lb.launch.options import START_TIMEOUT
from hvd_lb.report.run_directory import RunDirectory

#: The variable with the number of the inherited socket.
CONTROL = "HVD_LB_CONTROL_FD"
_GRACE_SECONDS = 5.0  # for ranks that are asked to end
_LAST_SECONDS = 3.0  # for agents to tell that they have
_FILES_PER_HOST, _FILES = 6, 64
_QUIET_SECONDS = 10.0  # of waiting for ranks before that is told, and between two tellings
_STOPPED_SECONDS = 5.0  # no machine is so busy
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds before a lost host is tried again, twice as long each time
_NOTICE_PAUSE = (
    10.0  # the first one after notice: whatever takes the host away may wait for who logs in there
)


class Head:
    """One job from its start to its end."""

    def __init__(self, job: dict[str, Any], job_file: Path, how: str, command: Sequence[str]):
        self._how, self._logins = how, Logins(job_file, how, command)
        self._places: list[tuple[str, int]] = [(name, slots) for name, slots in job["hosts"]]
        self.hosts = {name: Host(name, set(ranks)) for name, ranks in ranks_by_host(self._places).items()}
        self.waited_for = {rank for host in self.hosts.values() for rank in host.ranks}
        self.table: dict[int, dict[str, Any]] = {
            rank: {"host": host.name} for host in self.hosts.values() for rank in sorted(host.ranks)
        }
        self._changed = True
        self.values: dict[str, bytes] = {}  # of the rendezvous, for agents that come late
        self.record = Record(RunDirectory(Path(job["output"])))
        self._timeout = float(job["environment"][START_TIMEOUT])
        self._over = asyncio.Event()
        self.failed = False
        self._control: asyncio.StreamWriter | None = None
        self._secret = secrets.token_bytes(32)
        self._members = Members(job, self) if job.get("elastic") else None
        self._patience = self._members.patience if self._members else Patience()

    async def run(self, address: str) -> int:
        """The exit status: 0 when all ranks have ended well."""
        server = await asyncio.start_server(self._welcome, address, 0, backlog=1024)
        port = server.sockets[0].getsockname()[1]
        self._meeting = {"address": address, "port": port, "secret": self._secret.hex()}
        at_once = self._how == "all"
        starting = [self._start_all()] if at_once else [self._keep(host) for host in self.hosts.values()]
        self._tasks: list[asyncio.Task[None]] = []
        for work in (*starting, self._watch(), *self._controlled()):
            self._begin(work)
        await self._over.wait()
        if self._members:  # agents of other jobs end with their ranks
            self.tell_agents("end")
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        server.close()
        for host in self.hosts.values():
            if host.connection:
                await host.connection.close()
        self.record.table(self._described(), now=True)
        self.record.close()
        return int(self.failed)

    def _look_at(self, task: asyncio.Task[Any]) -> None:
        """A fault of this head ends the job: nobody would know that it waits in vain."""
        if not task.cancelled() and (error := task.exception()):
            print(f"the head failed: {type(error).__name__}: {error}", flush=True)
            self.stop()

    # Starting agents

    async def _start_all(self) -> None:
        why = await self._logins.on_all(self._line())
        for host in self.hosts.values():
            if not host.connected.is_set():
                self.lose(host, f"its agent did not start: {why}")

    async def _keep(self, host: Host) -> None:
        """Have an agent on a host, in an elastic job again whenever it was lost."""
        pause, tries = _PAUSE, LOGIN_TRIES
        while True:
            login = asyncio.create_task(self._login(host, tries))
            login.add_done_callback(self._look_at)
            try:
                await host.lost.wait()
                self._logins.kill(host.name)
            finally:
                login.cancel()
                await asyncio.gather(login, return_exceptions=True)
            if not self._members:
                return
            pause = _PAUSE if host.settled else min(2 * pause, _LONGEST_PAUSE)
            if host.going:
                pause = max(pause, _NOTICE_PAUSE)
            host.settled = False
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause)
            await host.wanted.wait()
            host.connected.clear()
            host.lost.clear()
            tries = 1

    async def _login(self, host: Host, tries: int) -> None:
        # One that has not come so far by then never will: a folder that hangs holds it up, say.
        late = asyncio.get_running_loop().call_later(self._timeout, self._lose_late, host)
        try:
            why = await self._logins.on(host.name, self._line(host), host.connected, tries)
        except OSError as error:
            why = str(error)
        finally:
            late.cancel()
        if not host.connected.is_set():
            self.lose(host, f"its agent did not start: {why}")
            if self._members and self._how == "nodes" and taken_out(why):
                self._members.give_up(host, "Slurm has taken it out of the job")

    def _lose_late(self, host: Host) -> None:
        if host.away and not host.connected.is_set():
            self.lose(host, f"its agent did not come within {self._timeout:.0f} s")

    def _line(self, host: Host | None = None) -> bytes:
        """What an agent has to know; `again`: ranks that the job began with on its host, if any, are gone."""
        patience = {"silence": self._patience.silence, "alive": self._patience.alive}
        there = {"again": bool(host and host.away), "interface": host.interface if host else ""}
        return json.dumps({**self._meeting, **patience, **there}).encode() + b"\n"

    def _come(self, name: str, slots: int, interface: str) -> None:
        """So many processes may be on that host, which may be new, or have been sent away before."""
        assert self._members is not None
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = Host(name, set(), away=True, interface=interface)
            self._members.add(host, slots)
            self._begin(self._keep(host))
            return
        if (
            not host.wanted.is_set() and not host.away
        ):  # it was sent away: its agent has ended, or does so now
            if host.ranks:
                self.lose(host, "it is named again before its processes have left")
            host.away = True
            host.lost.set()
        self._members.add(host, slots)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._look_at)
        self._tasks.append(task)

    # Agents

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            name, connection = await answer(reader, writer, self._secret, self._patience.silence)
            host = self.hosts[name]
            if host.connected.is_set():
                raise ConnectionLost(f"{name} has an agent already")
        except (ConnectionLost, LookupError, ValueError) as stranger:
            peer = writer.get_extra_info("peername")
            print(f"a connection from {peer} was refused: {stranger}", flush=True)
            writer.close()
            return
        host.connection = connection
        host.connected.set()
        for key, value in self.values.items():
            connection.send("put", value, key=key)
        if self.failed:
            connection.send("stop", grace=0.0)
        try:
            while host.connection is connection:
                self._hear(host, *await connection.receive())
        except ConnectionLost as lost:
            if (host.ranks or host.vacant) and host.connection is connection:
                killed = f"its agent was killed, or its host or network went away ({lost})"
                self.lose(host, "it had notice to end" if host.going and not host.ranks else killed)
        finally:
            connection.drop()
            if host.connection is connection:
                host.connection = None
            self._look_for_end()

    def _hear(self, host: Host, message: dict[str, Any], body: bytes) -> None:
        self._changed = True
        match message["kind"]:
            case "there" if self._members and not self.failed:
                self._members.host_is_there(host, message["life"], message["computes"])
            case "put":
                self.values[message["key"]] = body
                self.tell_agents("put", body, but=host, key=message["key"])
            case "delete":
                self.values.pop(message["key"], None)
                self.tell_agents("delete", but=host, key=message["key"])
            case "told":
                for rank, told in message["ranks"].items():
                    self.table[int(rank)].update(told)
                    if "arrived" in told:
                        self.waited_for.discard(int(rank))
                    if "stage" in told and self._members:
                        self._members.told(int(rank))
            case "started":
                for rank, pid in message["pids"].items():
                    self.table[int(rank)]["pid"] = pid
            case "ended":
                self._end(host, message["rank"], message["pid"], message["status"], message["signalled"])
            case "word" if self._members:
                self._members.word(message["rank"], message["word"], message["values"])
            case "failed":
                self.lose(host, message["why"])
            case "going" if self._members:
                self._members.go(host, told=self._how == "nodes")  # Slurm tells the ranks itself
            case "note":
                self.note(f"{host.name}: {message['text']}")

    def tell_agents(self, kind: str, body: bytes = b"", but: Host | None = None, **fields: Any) -> None:
        for host in self.hosts.values():
            if host.connection and host is not but:
                host.connection.send(kind, body, **fields)

    # Ends

    def _end(self, host: Host, rank: int, pid: int, status: int, signalled: bool) -> None:
        host.ranks.discard(rank)
        self.waited_for.discard(rank)
        self.table[rank]["ended"] = status
        self.record.ending(rank=rank, host=host.name, pid=pid, status=status, signalled=signalled)
        if self._members:
            self._members.ended(host, rank, status)
        elif status:
            self.stop()
        self._look_for_end()

    def lose(self, host: Host, why: str) -> None:
        """A host of which nothing more will be heard."""
        print(f"{host.name}: {why}", flush=True)
        host.connected.set()
        host.lost.set()
        if host.connection:
            host.connection.drop()
            host.connection = None
        if host.away:  # as before
            return
        ranks = sorted(host.ranks)
        self.record.ending(host=host.name, lost=why, ranks=ranks)
        host.ranks.clear()
        if self._members:
            self._members.host_lost(host, ranks, why)
        else:
            self.stop()
        self._look_for_end()

    def stop(self, grace: float = _GRACE_SECONDS) -> None:
        """End all ranks, as the job has failed or is to fail."""
        if not self.failed:
            self.failed = True
            self.tell_agents("stop", grace=grace)
            asyncio.get_running_loop().call_later(grace + _LAST_SECONDS, self._over.set)

    def _look_for_end(self) -> None:
        if not any(host.ranks for host in self.hosts.values()):
            self._over.set()

    # While it runs

    async def _watch(self) -> None:
        """Say who is waited for, and that this head is alive; give up those that do not come in time."""
        began = time.monotonic()
        first: float | None = None
        told, told_at, rounds = "", began, 0
        everyone = len(self.waited_for)
        now = began
        while True:
            await asyncio.sleep(1.0)
            rounds += 1
            before, now = now, time.monotonic()
            if (stopped := now - before - 1.0) > _STOPPED_SECONDS:  # as by Slurm, with all others of the job
                began += stopped
                first = first and first + stopped
                if self._members:
                    self._members.were_stopped(stopped)
            if self._members:
                self._members.look()
            if rounds % self._patience.alive == 0:
                self.tell_agents("alive")
            if first is None and len(self.waited_for) < everyone:
                first = now
            waiting = self.waiting
            if waiting != told and (not waiting or now > told_at + _QUIET_SECONDS):
                self.note(waiting or f"all {everyone} ranks are there, after {now - began:.0f} s")
                told, told_at, self._changed = waiting, now, True
            if waiting and now > (first or began) + self._timeout and not self.failed:
                self.record.ending(late=sorted(self.waited_for), seconds=self._timeout)
                self.stop()
            if self._changed and self.record.table(self._described()):
                self._changed = False

    @property
    def waiting(self) -> str:
        """Which ranks have not come so far that they meet the others; empty when all have."""
        if not self.waited_for:
            return ""
        who = name_ranks(self._places, self.waited_for)
        return f"waiting for {len(self.waited_for)} of {len(self.table)} ranks: {who}"

    def _described(self) -> dict[str, Any]:
        return {"waiting": self.waiting, "ranks": self.table}

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.tell_control(note=text)

    def tell_control(self, **message: Any) -> None:
        if self._control:
            self._control.write(json.dumps(message).encode() + b"\n")

    def _controlled(self) -> list[Any]:
        loop = asyncio.get_running_loop()
        number = os.environ.pop(CONTROL, None)
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            loop.add_signal_handler(sign, self.stop if number is None else lambda: None)
        return [] if number is None else [self._obey(socket.socket(fileno=int(number)))]

    async def _obey(self, control: socket.socket) -> None:
        """Do what the launching process says, and end the job with it."""
        control.set_inheritable(False)
        reader, self._control = await asyncio.open_unix_connection(sock=control)
        with suppress(OSError):
            while line := await reader.readline():
                message = json.loads(line)
                if "stop" in message:
                    self.stop()
                elif "ends" in message:
                    if self._members:
                        self._members.end_run(message["ends"])
                elif "again" in message:
                    if self._members:
                        self._members.end_generation()
                elif "come" in message:
                    self._come(message["come"], message["slots"], message["interface"])
                elif "gone" in message:
                    if self._members and (host := self.hosts.get(message["gone"])):
                        self._members.release(host)
                else:
                    self.tell_agents("signal", signal=message["signal"], rank=message["rank"])
        self.stop(grace=0.0)


async def _main(arguments: list[str]) -> int:
    job_file, address, how, *command = arguments
    job = json.loads(Path(job_file).read_text("utf-8"))
    if said := allow_open_files(_FILES + _FILES_PER_HOST * len(job["hosts"])):
        print(said, flush=True)
    return await Head(job, Path(job_file), how, command).run(address)


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(sys.argv[1:])))
