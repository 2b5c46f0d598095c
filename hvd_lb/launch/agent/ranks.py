"""The ranks of one host, as its agent holds them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvd_lb.launch.agent.channel import AT_ONCE, DESCRIPTOR, MOST_BYTES
from hvd_lb.launch.agent.process import dies_with_parent
from hvd_lb.launch.launch_plan import rank_command


@dataclass(frozen=True)
class RankEnd:
    """How a process ended; `status` is negative for a signal. `told` is what of its words was not handed on yet."""

    pid: int
    status: int
    signalled: bool  #: its agent had asked it to end
    told: dict[str, dict[str, Any]]


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    line: socket.socket
    signalled: bool = False  #: by this agent, to end it
    told: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  #: the newest of each kind that is not handed on yet


class HostRanks:
    """Processes of this host; `on_end(rank, ended)` is called once for each that ends, before that what it said.

    `on_word(rank, kind, values)` is called for what it says AT_ONCE.
    """

    def __init__(
        self,
        on_end: Callable[[int, RankEnd], None],
        on_word: Callable[[int, str, dict[str, Any]], None] = lambda rank, kind, values: None,
    ):
        self._ranks: dict[int, _Rank] = {}
        self._on_end, self._on_word = on_end, on_word
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGCHLD, self._bury)

    def start(
        self,
        rank: int,
        job_file: Path,
        environment: Mapping[str, str],
        log: Path,
        descriptors: Sequence[int] = (),
    ) -> int:
        """Start a rank that writes to `log` and has these `descriptors`, too; its process ID.

        It does not outlive this process. OSError.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            process = subprocess.Popen(
                rank_command(job_file),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env={**environment, DESCRIPTOR: str(theirs.fileno())},
                pass_fds=(theirs.fileno(), *descriptors),
                start_new_session=True,  # so that what it starts ends with it
                preexec_fn=dies_with_parent(),
            )
        finally:
            os.close(descriptor)
            theirs.close()
        self._ranks[rank] = _Rank(process, ours)
        self._loop.add_reader(ours, self._hear, rank, self._ranks[rank])
        return process.pid

    @property
    def alive(self) -> bool:
        return bool(self._ranks)

    def news(self) -> dict[int, dict[str, dict[str, Any]]]:
        """What ranks have told since the last call, by rank and kind."""
        found = {number: rank.told for number, rank in self._ranks.items() if rank.told}
        for number in found:
            self._ranks[number].told = {}
        return found

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to all."""
        for name, there in self._ranks.items():
            if rank in (None, name):
                there.process.send_signal(number)

    def terminate(self) -> None:
        """Ask all to end."""
        for rank in self._ranks.values():
            rank.signalled = True
            rank.process.terminate()

    def kill(self) -> None:
        """End all, and what they have started."""
        for rank in self._ranks.values():
            rank.signalled = True
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)

    def _bury(self) -> None:
        for number, rank in list(self._ranks.items()):
            if (status := rank.process.poll()) is not None:
                self._hear(number, rank)
                self._loop.remove_reader(rank.line)
                rank.line.close()
                del self._ranks[number]
                self._on_end(number, RankEnd(rank.process.pid, status, rank.signalled, rank.told))

    def say(self, rank: int, message: Mapping[str, Any]) -> None:
        """To a rank, if it still lives."""
        if there := self._ranks.get(rank):
            with suppress(OSError):  # it has just ended, or stands still and has not taken a hundred of them
                there.line.send(json.dumps(message).encode())

    def __contains__(self, rank: int) -> bool:
        return rank in self._ranks

    def _hear(self, number: int, rank: _Rank) -> None:
        while True:
            try:
                message = rank.line.recv(MOST_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:  # it has closed its end, and most likely ended
                self._loop.remove_reader(rank.line)
                return
            with suppress(ValueError, LookupError, AttributeError):  # not from `tell`
                values = json.loads(message)
                kind = values.pop("kind")
                if kind in AT_ONCE:
                    self._on_word(number, kind, values)
                else:
                    rank.told[kind] = {"time": time.time(), **values}
