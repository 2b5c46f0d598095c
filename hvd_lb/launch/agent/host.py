"""The agent of one host: `python -P -m hvd_lb.launch.agent.host JOB.json [HOST]`, started by the head.

It reads one line: where the head listens, and the job's secret. It connects, starts the ranks of its host, is their
rendezvous, and tells the head what they put there, what they tell, and how each ends. HOST may be left out in a task of
Slurm. Its life is the connection: when that ends, or is silent for about a minute, it kills its ranks and ends.
Signals that a scheduler sends to all processes are left to the ranks, which end with a checkpoint; then so does the
agent. In an elastic job SIGTERM to the agent is notice that its host is to end. An agent that has lost the head of an
elastic job of Slurm sees to it that the job does not run on without anybody.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvd_lb.launch.agent.connection import Connection, ConnectionLost, Patience, call
from hvd_lb.launch.agent.places import rank_environments
from hvd_lb.launch.agent.process import allow_open_files, end_predecessors
from hvd_lb.launch.agent.ranks import HostRanks, RankEnd
from hvd_lb.launch.agent.rendezvous import Rendezvous
from hvd_lb.launch.rank.names import MEMBER, PIXELS, log_name
from hvd_lb.machine.cpu import computes_by, describe_cpu
from hvd_lb.machine.gpus import gpus
from hvd_lb.machine.packages import COMPUTING, version
from hvd_lb.machine.process import this_life
from hvd_lb.machine.slurm import put_back_without_script
from hvd_lb.world.launched import without_job

_TELL_SECONDS = 1.0
_MOST_VALUE = 1 << 24
_FILES = 1024  # of a rank, beside its connections


async def serve(job_file: Path, host: str, meeting: dict[str, Any]) -> int:
    """Run the ranks of a host; the exit status, 0 when all of them have ended and that is told."""
    patience = Patience(meeting["silence"], meeting["alive"])
    if meeting["again"]:  # the one before may stand still, or not know yet that it is lost
        end_predecessors()
    secret = bytes.fromhex(meeting["secret"])
    connection = await call(meeting["address"], meeting["port"], secret, host, patience.of_agent)
    agent = Agent(connection, patience.alive, meeting["interface"])
    try:
        agent.start(job_file, host, begins=not meeting["again"])
        return await agent.run()
    except OSError as error:
        connection.send("failed", why=f"its ranks cannot be started: {error}")
        return 1
    finally:
        agent.ranks.kill()
        await connection.close()


class Agent:
    """What a host's agent holds: its ranks, their rendezvous, its connection."""

    def __init__(self, connection: Connection, alive: int, interface: str):
        self._connection, self._alive = connection, alive
        names = ("HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME")  # of a host of which the job's file says nothing
        self._interface = dict.fromkeys(names, interface) if interface else {}
        self._over = asyncio.Event()
        self._spawn: Callable[[int, dict[str, str]], int]
        self._elastic = False  # ranks may come after all have ended
        self.ranks = HostRanks(self._ended, self._said)
        self.rendezvous = Rendezvous(publish=self._publish)

    def start(self, job_file: Path, host: str, *, begins: bool) -> None:
        """With the ranks that the job begins with on this host, or none; OSError where that cannot be."""
        job = json.loads(job_file.read_text("utf-8"))
        self._host, self._elastic = host, job.get("elastic", False)
        self._connection.send("there", life=this_life(), computes=_computes(job))
        logs = Path(job["output"]) / "logs"
        # Empty until ranks give it a size. It is there for those that come later, and goes with the last of all.
        cached = self._elastic and job["recipe"]["cache"] == "memory"
        held = [os.memfd_create("hvd-lb pixels")] if cached else []
        more = {PIXELS: str(held[0])} if held else {}

        def begin(member: int, place: dict[str, str]) -> int:
            environment = {
                **without_job(os.environ),
                **job["environment"],
                **self._interface,
                **place,
                **more,
            }
            return self.ranks.start(member, job_file, environment, logs / log_name(member, host), held)

        self._spawn = begin
        if said := allow_open_files(2 * job["processes"] + _FILES):
            self._connection.send("note", text=said)
        if not begins:
            return
        started = {}
        for rank, place in rank_environments(job["hosts"], host).items():
            started[rank] = begin(rank, {**place, **self.rendezvous.environment(str(rank))})
        self._connection.send("started", pids=started)

    async def run(self) -> int:
        """Until the ranks have ended, or the head says so. `ConnectionLost` where it says no more."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            loop.add_signal_handler(number, lambda: None)
        loop.add_signal_handler(signal.SIGTERM, self._notice)
        listening = asyncio.create_task(self._listen())
        tasks = [listening, *(asyncio.create_task(work) for work in (self._over.wait(), self._tell()))]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if listening in done:
            listening.result()
        return int(self.ranks.alive)

    def _notice(self) -> None:
        """SIGTERM: an elastic job has this host's ranks leave; of others the ranks have the signal themselves."""
        if self._elastic:
            self._connection.send("going")

    async def _tell(self) -> None:
        """Say what is new, and now and then that there is nothing."""
        rounds = 0
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            rounds += 1
            if news := self.ranks.news():
                self._connection.send("told", ranks=news)
            elif rounds % self._alive == 0:
                self._connection.send("alive")

    async def _listen(self) -> None:
        """Do what the head says; `ConnectionLost` when it says no more."""
        loop = asyncio.get_running_loop()
        while True:
            message, body = await self._connection.receive()
            match message["kind"]:
                case "put":
                    self.rendezvous.set(message["key"], _inflated(body))
                case "delete":
                    self.rendezvous.set(message["key"], None)
                case "signal":
                    self.ranks.signal(message["signal"], message["rank"])
                case "start":
                    self._begin_member(**message)
                case "over":
                    self.rendezvous.end(message["generation"])
                    for member in message["members"]:
                        self.ranks.say(member, message)
                case "ask" | "dismiss":
                    self.ranks.say(message["member"], message)
                case "begin":
                    self._begin_generation(message)
                case "end":
                    return
                case "stop":
                    self.ranks.terminate()
                    loop.call_later(message["grace"], self.ranks.kill)

    def _begin_member(self, kind: str, member: int, slot: int, slots: int) -> None:
        """A newcomer in a place of this host; it learns its rank when a generation begins."""
        try:
            pid = self._spawn(member, {MEMBER: f"{member} {self._host} {slot} {slots}"})
        except OSError as error:
            self._connection.send("note", text=f"a process cannot be started: {error}")
            self._connection.send("ended", rank=member, pid=0, status=1, signalled=False)
        else:
            self._connection.send("started", pids={member: pid})

    def _begin_generation(self, message: dict[str, Any]) -> None:
        """Tell the members of this host their places."""
        members = dict(message["hosts"])
        hosts = [(name, len(there)) for name, there in message["hosts"]]
        numbers = [member for _, there in message["hosts"] for member in there]
        if self._host not in members:
            return
        places = rank_environments(hosts, self._host).values()
        for member, place in zip(members[self._host], places, strict=True):
            meeting = self.rendezvous.environment(str(member), message["generation"])
            told = {**message, "hosts": hosts, "numbers": numbers, "environment": {**place, **meeting}}
            self.ranks.say(member, told)

    def _said(self, rank: int, kind: str, values: dict[str, Any]) -> None:
        self._connection.send("word", rank=rank, word=kind, values=values)

    def _ended(self, rank: int, end: RankEnd) -> None:
        self._connection.send("told", ranks={rank: end.told})
        self._connection.send("ended", rank=rank, pid=end.pid, status=end.status, signalled=end.signalled)
        if not self.ranks.alive and not self._elastic:
            self._over.set()

    def _publish(self, key: str, value: bytes | None) -> None:
        if value is None:
            self._connection.send("delete", key=key)
        else:
            self._connection.send("put", zlib.compress(value, 1), key=key)


def _computes(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the bits of ranks on this host depend on."""
    there = gpus({**os.environ, **job["environment"]}) if job.get("device") == "cuda" else []
    return {
        "software": {name: version(name) for name in ("hvd-lb", "horovod", *COMPUTING)},
        "hardware": computes_by(describe_cpu(), [gpu["name"] for gpu in there]),
    }


def _inflated(body: bytes) -> bytes:
    return zlib.decompressobj().decompress(body, _MOST_VALUE)


def main() -> int:
    job_file = Path(sys.argv[1])
    host = sys.argv[2] if len(sys.argv) > 2 else os.environ["SLURMD_NODENAME"]
    line = sys.stdin.readline()
    if not line:  # the head is gone
        return 1
    try:
        return asyncio.run(serve(job_file, host, json.loads(line)))
    except ConnectionLost as lost:
        print(f"hvd-lb: {lost}", file=sys.stderr)
        job = json.loads(job_file.read_text("utf-8"))
        if job.get("starter") == "slurm" and job.get("elastic"):
            put_back_without_script(os.environ["SLURM_JOB_ID"])
        return 1


if __name__ == "__main__":
    sys.exit(main())
