"""How a head has agents started: by command lines, on other machines over ssh or by srun, or by srun on all at once."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.launch.agent.process import dies_with_parent
from hvd_lb.launch.hosts import is_this_machine
from hvd_lb.launch.launch_plan import ON_COMMAND_LINES, agent_command

LOGIN_TRIES = 5  #: of a login that sshd turns away
# Stock sshd refuses logins at random from the 11th that is under way (MaxStartups 10:30:100): that of one host never
# sees so many, but one that all pass through (ProxyJump) would.
_LOGINS_AT_ONCE = 8
_LOGIN_SECONDS = 2.0  # then one has most likely come through, and the next may
_END_SECONDS = 20.0  # for one that has to end, and may wait for what it has started, as srun does
_REFUSED_LOGIN = re.compile("kex_exchange_identification|Connection (closed|reset) by|banner exchange")
_SSH_FAILED = 255
# What srun says of a node that Slurm has taken out of the job, as it was lost: no step gets there any more.
_TAKEN_OUT = re.compile("Requested node configuration is not available|Invalid node name")
_SAID = 1 << 16


@dataclass(frozen=True)
class _Ended:
    """How a command has ended, and what it said last."""

    status: int
    last: str

    @property
    def refused(self) -> bool:
        return self.status == _SSH_FAILED and (not self.last or bool(_REFUSED_LOGIN.search(self.last)))

    def __str__(self) -> str:
        return self.last or f"exit code {self.status}"


def taken_out(why: str) -> bool:
    """Whether an agent did not start, and never will, since its node is none of the job's any more."""
    return bool(_TAKEN_OUT.search(why))


class Logins:
    """The commands of a job that have started agents, and live as long as they do: `command` is `ssh …` or `srun …`."""

    def __init__(self, job_file: Path, how: str, command: Sequence[str]):
        self._job_file, self._how, self._command = job_file, how, command
        self._at_once = asyncio.Semaphore(_LOGINS_AT_ONCE)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    async def on(self, host: str, line: bytes, connected: asyncio.Event, tries: int = LOGIN_TRIES) -> str:
        """Run the agent of one host, which is told `line`, until it ends; what it or ssh said last."""
        there = [*agent_command(self._job_file), host]
        if self._how == "nodes":  # this one, too: its step has what the job has there
            return str(await self._run(host, [*self._command, host, *there], line))
        if is_this_machine(host):
            return str(await self._run(host, there, line))
        exported = [f"{name}={os.environ[name]}" for name in ON_COMMAND_LINES if name in os.environ]
        command = [*self._command, host, shlex.join(["env", *exported, *there])]
        for attempt in range(1, tries + 1):
            async with self._at_once:
                login = asyncio.create_task(self._run(host, command, line))
                through = asyncio.create_task(connected.wait())
                try:
                    await asyncio.wait(
                        (login, through), timeout=_LOGIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                except asyncio.CancelledError:
                    login.cancel()
                    raise
                finally:
                    through.cancel()
            ended = await login
            if connected.is_set() or not ended.refused:
                break
            if attempt < tries:
                await asyncio.sleep(random.uniform(0.5, 1.0) * attempt)
        return str(ended)

    async def on_all(self, line: bytes) -> str:
        """As `on`, by the command alone, which starts one agent on every host."""
        return str(await self._run("all hosts", self._command, line))

    def kill(self, host: str) -> None:
        """End what has started the agent of a host, whatever it does."""
        if process := self._processes.get(host):
            process.kill()

    async def _run(self, name: str, command: Sequence[str], line: bytes) -> _Ended:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,  # what was not read in time is not written again when the pipe is closed
            preexec_fn=dies_with_parent(signal.SIGTERM),
        ) as process:
            self._processes[name] = process
            try:
                last = await _talk(process, line, name)
                await _end_of(process)
            finally:
                process.terminate()
                with suppress(TimeoutError):
                    await asyncio.wait_for(_end_of(process), _END_SECONDS)
                process.kill()  # it stands still
        return _Ended(process.returncode, last)


async def _end_of(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        await asyncio.sleep(0.05)


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
