"""The head of a job: `python -P -m hvd_lb.launch.agent.head JOB.json ADDRESS each|all [COMMAND…]`.

It listens on ADDRESS, has an agent started on each host, and holds the job together: what one agent publishes for the
rendezvous goes to all; when a rank fails or a host is lost, all are ended; the exit status is 0 when all ranks ended
well. `each` starts agents one by one, with COMMAND (ssh …) in front where the host is another machine; `all` runs
COMMAND (srun …) once, which starts one agent on every host.

The launching process, if there is one, holds the other end of a socket (`CONTROL`): lines of JSON, downwards
{"signal": 10, "rank": 3 or null} and {"stop": true}, upwards {"note": "for a person"} and, of an elastic job,
{"members": {"3": "h1"}}. When it is gone, the job is ended. Then signals to this process are ignored: the launching
process decides what becomes of them.

In an elastic job a lost rank or host ends none of the others: they make the next generation (`generations`), and where
a rank was lost on a host that is there another is started, which joins.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvd_lb.launch.agent.connection import ALIVE_SECONDS, Connection, ConnectionLost, answer
from hvd_lb.launch.agent.generations import Ask, Begin, Generations, GiveUp, Over, Wait
from hvd_lb.launch.agent.places import name_ranks, ranks_by_host
from hvd_lb.launch.agent.process import allow_open_files, dies_with_parent
from hvd_lb.launch.agent.record import Record
from hvd_lb.launch.hosts import is_this_machine
from hvd_lb.launch.launch_plan import ON_COMMAND_LINES, agent_command
from hvd_lb.launch.options import START_TIMEOUT
from hvd_lb.report.run_directory import RunDirectory

#: The variable with the number of the inherited socket.
CONTROL = "HVD_LB_CONTROL_FD"
# Stock sshd refuses logins at random from the 11th that is under way (MaxStartups 10:30:100): that of one host never
# sees so many, but one that all pass through (ProxyJump) would.
_LOGINS_AT_ONCE = 8
_LOGIN_SECONDS = 2.0  # then one has most likely come through, and the next may
_LOGIN_TRIES = 5
_REFUSED_LOGIN = re.compile("kex_exchange_identification|Connection (closed|reset) by|banner exchange")
_SSH_FAILED = 255
_GRACE_SECONDS = 5.0  # for ranks that are asked to end
_LAST_SECONDS = 3.0  # for agents to tell that they have
_FILES_PER_HOST, _FILES = 6, 64
_SAID = 1 << 16
_QUIET_SECONDS = 10.0  # of waiting for ranks before that is told, and between two tellings
_WRONG = 2  # the exit status of a rank whose failure others would repeat


@dataclass
class _Host:
    name: str
    ranks: set[int]  #: that have not ended
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    connection: Connection | None = None


class Head:
    """One job from its start to its end."""

    def __init__(self, job: dict[str, Any], job_file: Path, how: str, command: Sequence[str]):
        self._job_file, self._how, self._command = job_file, how, command
        self._places: list[tuple[str, int]] = [(name, slots) for name, slots in job["hosts"]]
        self._hosts = {name: _Host(name, set(ranks)) for name, ranks in ranks_by_host(self._places).items()}
        self._waited_for = {rank for host in self._hosts.values() for rank in host.ranks}
        self._table: dict[int, dict[str, Any]] = {
            rank: {"host": host.name} for host in self._hosts.values() for rank in sorted(host.ranks)
        }
        self._changed = True
        self._values: dict[str, bytes] = {}  # of the rendezvous, for agents that come late
        self._record = Record(RunDirectory(Path(job["output"])))
        self._timeout = float(job["environment"][START_TIMEOUT])
        self._logins = asyncio.Semaphore(_LOGINS_AT_ONCE)
        self._over = asyncio.Event()
        self._failed = False
        self._control: asyncio.StreamWriter | None = None
        self._secret = secrets.token_bytes(32)
        self._generations: Generations | None = None
        if job.get("elastic"):
            where = {rank: host.name for host in self._hosts.values() for rank in sorted(host.ranks)}
            self._generations = Generations(where, job["min_processes"])
            places = ranks_by_host(self._places)
            self._slots = {
                rank: (rank - there.start, len(there)) for there in places.values() for rank in there
            }
            self._leaving: set[int] = set()
            self._since = 0.0  # when the present generation was found to be over, or newcomers were there

    async def run(self, address: str) -> int:
        """The exit status: 0 when all ranks have ended well."""
        server = await asyncio.start_server(self._welcome, address, 0, backlog=1024)
        port = server.sockets[0].getsockname()[1]
        meeting = {"address": address, "port": port, "secret": self._secret.hex()}
        line = json.dumps(meeting).encode() + b"\n"
        if self._how == "all":
            starting = [self._start_all(line)]
        else:
            starting = [self._start_each(host, line) for host in self._hosts.values()]
        tasks = [asyncio.create_task(work) for work in (*starting, self._watch(), *self._controlled())]
        for task in tasks:
            task.add_done_callback(self._look_at)
        await self._over.wait()
        if self._generations:  # agents of other jobs end with their ranks
            self._to_agents("end")
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.close()
        for host in self._hosts.values():
            if host.connection:
                await host.connection.close()
        self._record.table(self._described(), now=True)
        self._record.close()
        return int(self._failed)

    def _look_at(self, task: asyncio.Task[Any]) -> None:
        """A fault of this head ends the job: nobody would know that it waits in vain."""
        if not task.cancelled() and (error := task.exception()):
            print(f"the head failed: {type(error).__name__}: {error}", flush=True)
            self.stop()

    # Starting agents

    async def _start_each(self, host: _Host, line: bytes) -> None:
        there = [*agent_command(self._job_file), host.name]
        if is_this_machine(host.name):
            await self._run(host.name, there, line, [host])
            return
        exported = [f"{name}={os.environ[name]}" for name in ON_COMMAND_LINES if name in os.environ]
        command = [*self._command, host.name, shlex.join(["env", *exported, *there])]
        for attempt in range(1, _LOGIN_TRIES + 1):
            async with self._logins:
                login = asyncio.create_task(self._run(host.name, command, line, [host], attempt))
                through = asyncio.create_task(host.connected.wait())
                await asyncio.wait(
                    (login, through), timeout=_LOGIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                through.cancel()
            if not await login:
                return
            await asyncio.sleep(random.uniform(0.5, 1.0) * attempt)

    async def _start_all(self, line: bytes) -> None:
        await self._run("all hosts", self._command, line, list(self._hosts.values()))

    async def _run(
        self, name: str, command: Sequence[str], line: bytes, hosts: list[_Host], attempt: int = _LOGIN_TRIES
    ) -> bool:
        """Run what starts agents, which lives as long as they do; whether to try it again."""
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,  # what was not read in time is not written again when the pipe is closed
            preexec_fn=dies_with_parent(signal.SIGTERM),
        ) as process:
            try:
                last = await _talk(process, line, name)
                while (status := process.poll()) is None:
                    await asyncio.sleep(0.05)
            finally:
                process.terminate()
        silent = [host for host in hosts if not host.connected.is_set()]
        refused = status == _SSH_FAILED and (not last or bool(_REFUSED_LOGIN.search(last)))
        if silent and refused and attempt < _LOGIN_TRIES:
            return True
        for host in silent:
            self._lose(host, f"its agent did not start: {last or f'exit code {status}'}")
        return False

    # Agents

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            name, connection = await answer(reader, writer, self._secret)
            host = self._hosts[name]
            if host.connected.is_set():
                raise ConnectionLost(f"{name} has an agent already")
        except (ConnectionLost, LookupError, ValueError) as stranger:
            peer = writer.get_extra_info("peername")
            print(f"a connection from {peer} was refused: {stranger}", flush=True)
            writer.close()
            return
        host.connection = connection
        host.connected.set()
        for key, value in self._values.items():
            connection.send("put", value, key=key)
        if self._failed:
            connection.send("stop", grace=0.0)
        try:
            while True:
                self._hear(host, *await connection.receive())
        except ConnectionLost as lost:
            if host.ranks:
                self._lose(host, f"its agent was killed, or its host or network went away ({lost})")
        finally:
            host.connection = None
            self._look_for_end()

    def _hear(self, host: _Host, message: dict[str, Any], body: bytes) -> None:
        self._changed = True
        match message["kind"]:
            case "put":
                self._values[message["key"]] = body
                self._to_agents("put", body, but=host, key=message["key"])
            case "delete":
                self._values.pop(message["key"], None)
                self._to_agents("delete", but=host, key=message["key"])
            case "told":
                for rank, told in message["ranks"].items():
                    self._table[int(rank)].update(told)
                    if "arrived" in told:
                        self._waited_for.discard(int(rank))
            case "started":
                for rank, pid in message["pids"].items():
                    self._table[int(rank)]["pid"] = pid
            case "ended":
                self._end(host, message["rank"], message["pid"], message["status"], message["signalled"])
            case "word":
                self._word(message["rank"], message["word"], message["values"])
            case "failed":
                self._lose(host, message["why"])
            case "note":
                self._note(f"{host.name}: {message['text']}")

    def _to_agents(self, kind: str, body: bytes = b"", but: _Host | None = None, **fields: Any) -> None:
        for host in self._hosts.values():
            if host.connection and host is not but:
                host.connection.send(kind, body, **fields)

    # Ends

    def _end(self, host: _Host, rank: int, pid: int, status: int, signalled: bool) -> None:
        host.ranks.discard(rank)
        self._waited_for.discard(rank)
        self._table[rank]["ended"] = status
        self._record.ending(rank=rank, host=host.name, pid=pid, status=status, signalled=signalled)
        if self._generations:
            self._end_member(host, rank, status, signalled)
        elif status:
            self.stop()
        self._look_for_end()

    def _lose(self, host: _Host, why: str) -> None:
        """A host of which nothing more will be heard."""
        print(f"{host.name}: {why}", flush=True)
        ranks = sorted(host.ranks)
        self._record.ending(host=host.name, lost=why, ranks=ranks)
        host.ranks.clear()
        host.connected.set()
        if self._generations:
            for rank in ranks:
                self._waited_for.discard(rank)
                self._generations.lose(rank, f"rank {rank} on {host.name} ({why})")
            self._go_on()
        else:
            self.stop()
        self._look_for_end()

    # Elastic jobs

    def _word(self, member: int, kind: str, values: dict[str, Any]) -> None:
        """What a member says of itself."""
        if self._generations is None:
            return
        if kind == "leaving":
            self._leaving.add(member)
        elif kind == "begun":
            self._generations.begun(values["generation"])
        else:
            self._generations.ready(member, **values)
            self._go_on()

    def _end_member(self, host: _Host, member: int, status: int, signalled: bool) -> None:
        generations = self._generations
        assert generations is not None
        if self._failed:
            return
        if status == _WRONG:
            self._record.ending(wrong=member)
            self.stop()
        elif status == 0 and member in self._leaving:
            generations.leave(member, f"rank {member} on {host.name}")
        elif status == 0:
            generations.finish(member)
            for newcomer in generations.newcomers:
                self._to_agents("signal", signal=signal.SIGKILL, rank=newcomer)
        else:
            had_joined = member in generations.members
            generations.lose(member, f"rank {member} on {host.name} ({_in_words(status)})")
            if had_joined and host.connection and not generations.finished:
                self._replace(host, member)
        self._go_on()

    def _replace(self, host: _Host, member: int) -> None:
        """Start a newcomer in the place of a lost member; one that is lost before it has joined is not replaced."""
        assert self._generations is not None
        assert host.connection is not None
        newcomer = len(self._table)
        slot, slots = self._slots[newcomer] = self._slots[member]
        self._table[newcomer] = {"host": host.name}
        host.ranks.add(newcomer)
        self._generations.start(newcomer, host.name)
        host.connection.send("start", member=newcomer, slot=slot, slots=slots)

    def _go_on(self) -> None:
        """Do what the generations say is to be done."""
        generations = self._generations
        assert generations is not None
        while not self._failed and (order := generations.order()):
            match order:
                case Over(generation):
                    self._since = time.monotonic()
                    self._to_agents("over", generation=generation, members=list(generations.members))
                    # Values of the rendezvous that an agent puts from now on are of later generations.
                    self._values.clear()
                case Ask(member):
                    self._to_agents("ask", member=member)
                case Wait(why):
                    self._note(why)
                case Begin():
                    self._begin(order)
                case GiveUp(why):
                    self._record.ending(gave_up=why)
                    self.stop(grace=0.0)

    def _begin(self, begin: Begin) -> None:
        now = sum(len(there) for _, there in begin.hosts)
        self._record.ending(generation=begin.generation, processes=now)
        self._to_agents(
            "begin",
            generation=begin.generation,
            hosts=begin.hosts,
            change={
                "before": begin.before,
                "processes": now,
                "lost": begin.lost,
                "left": begin.left,
                "joined": begin.joined,
                "seconds": time.monotonic() - self._since,
            },
        )
        print(
            f"generation {begin.generation}: {begin.hosts}; lost: {begin.lost}, left: {begin.left}",
            flush=True,
        )
        self._tell_control(members={str(member): host for host, there in begin.hosts for member in there})

    def stop(self, grace: float = _GRACE_SECONDS) -> None:
        """End all ranks, as the job has failed or is to fail."""
        if not self._failed:
            self._failed = True
            self._to_agents("stop", grace=grace)
            asyncio.get_running_loop().call_later(grace + _LAST_SECONDS, self._over.set)

    def _look_for_end(self) -> None:
        if not any(host.ranks for host in self._hosts.values()):
            self._over.set()

    # While it runs

    async def _watch(self) -> None:
        """Say who is waited for, and that this head is alive; give up those that do not come in time."""
        began = time.monotonic()
        first: float | None = None
        told, told_at, rounds = "", began, 0
        everyone = len(self._waited_for)
        while True:
            await asyncio.sleep(1.0)
            rounds += 1
            now = time.monotonic()
            if rounds % ALIVE_SECONDS == 0:
                self._to_agents("alive")
            if first is None and len(self._waited_for) < everyone:
                first = now
            waiting = self.waiting
            if waiting != told and (not waiting or now > told_at + _QUIET_SECONDS):
                self._note(waiting or f"all {everyone} ranks are there, after {now - began:.0f} s")
                told, told_at, self._changed = waiting, now, True
            if waiting and now > (first or began) + self._timeout and not self._failed:
                self._record.ending(late=sorted(self._waited_for), seconds=self._timeout)
                self.stop()
            if self._changed and self._record.table(self._described()):
                self._changed = False

    @property
    def waiting(self) -> str:
        """Which ranks have not come so far that they meet the others; empty when all have."""
        if not self._waited_for:
            return ""
        who = name_ranks(self._places, self._waited_for)
        return f"waiting for {len(self._waited_for)} of {len(self._table)} ranks: {who}"

    def _described(self) -> dict[str, Any]:
        return {"waiting": self.waiting, "ranks": self._table}

    def _note(self, text: str) -> None:
        print(text, flush=True)
        self._tell_control(note=text)

    def _tell_control(self, **message: Any) -> None:
        if self._control:
            self._control.write(json.dumps(message).encode() + b"\n")

    def _controlled(self) -> list[Any]:
        loop = asyncio.get_running_loop()
        number = os.environ.pop(CONTROL, None)
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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
                else:
                    self._to_agents("signal", signal=message["signal"], rank=message["rank"])
        self.stop(grace=0.0)


def _in_words(status: int) -> str:
    return f"exit code {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"


async def _talk(process: subprocess.Popen[bytes], line: bytes, name: str) -> str:
    """Tell an agent's process what it has to know, and hand on what it says; the last of that."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):
        process.stdin.write(line)
        process.stdin.flush()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stdout
    )
    last = ""
    try:
        while said := await reader.read(_SAID):
            for text in filter(None, map(str.strip, said.decode("utf-8", "replace").splitlines())):
                print(f"{name}: {text}", flush=True)
                last = text
    finally:
        transport.close()
    return last


async def _main(arguments: list[str]) -> int:
    job_file, address, how, *command = arguments
    job = json.loads(Path(job_file).read_text("utf-8"))
    if said := allow_open_files(_FILES + _FILES_PER_HOST * len(job["hosts"])):
        print(said, flush=True)
    return await Head(job, Path(job_file), how, command).run(address)


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(sys.argv[1:])))
