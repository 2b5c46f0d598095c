"""A rank that another launcher has started (torchrun, srun, mpirun, horovodrun): it becomes one of a run.

All ranks meet, as they would in a program of a user's own, and say what they are. Rank 0 has the launching process as a
child, which plans the run and tells it the job (`starters.launched`); the others hear of it from rank 0. Whatever the
launching process ends by, all end by.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hvd_lb import world as worlds
from hvd_lb.errors import UserError
from hvd_lb.launch.preflight.probe import horovod_build, versions
from hvd_lb.launch.rank.entry import write_to
from hvd_lb.launch.rank.names import OF_OTHERS, log_name
from hvd_lb.launch.starters.launched import cores_of
from hvd_lb.launch.stopping import heeded_signals
from hvd_lb.machine.cpu import describe_cpu, kernel_variables, usable_cores
from hvd_lb.machine.gpus import gpus
from hvd_lb.machine.pinning import pin
from hvd_lb.world import World
from hvd_lb.world.engine import EngineName, choose_engine
from hvd_lb.world.gather import gather_bytes
from hvd_lb.world.launched import Place

# The others are told that rank 0 still plans: nobody waits for anything so long that a library gives up.
_PLANNING_SECONDS = 2.0


class LaunchingProcess:
    """On rank 0: its child, at the other end of `line`."""

    def __init__(self, line: socket.socket, pid: int):
        self._line, self._lines, self._pid = line, line.makefile("rb"), pid
        self._ends = threading.RLock()  # a signal may come while it ends

    def tell(self, value: Any) -> None:
        self._line.sendall(json.dumps(value).encode() + b"\n")

    def job(self, seconds: float) -> bytes:
        """The job it has told, in JSON; its exit status where it has ended instead; empty where it still plans."""
        if not select.select([self._line], [], [], seconds)[0]:
            return b""
        return self._lines.readline() or str(self._status()).encode()

    def end_with_it(self) -> None:
        """From here on end this process, and so the job, when that one has gone."""

        def watch() -> None:
            select.select([self._line], [], [])
            with self._ends:
                os._exit(1)

        threading.Thread(target=watch, name="launching process", daemon=True).start()

    def end(self, status: int) -> NoReturn:
        """End this process with the status that the launching process finds, once it has summed up the run."""
        with self._ends:
            try:
                self.tell(status)
                status = self._status()
            finally:
                os._exit(status)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def _status(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return status if status >= 0 else 128 - status


def take_part(place: Place, asked: EngineName, launching: LaunchingProcess | None) -> NoReturn:
    """Be a rank of the run from here on; `launching` is given on rank 0. The process ends in here."""
    for number in heeded_signals():  # nothing to be saved yet, and libraries that wait hear nothing
        signal.signal(number, signal.SIG_DFL)
    try:
        engine, why = choose_engine(asked, place)
        world = worlds.init(engine, watched=True)
        said = gather_bytes(world, json.dumps(describe(world)).encode(), "hvd_lb.launched")
        ranks = [json.loads(one) for one in said]
        if launching:
            launching.tell([engine, why, ranks])
        job = _hear(world, launching)
        if isinstance(job, int):
            worlds.shutdown()
            os._exit(job)
        _prepare(job, world, ranks)
    except Exception as error:
        if launching:
            launching.kill()
        if place.rank == 0 or type(error).__name__ not in OF_OTHERS:
            what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            who = f"rank {place.rank} on {socket.gethostname()}"
            print(f"hvd-lb: error: {who}: {what}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(error, UserError) else 1)

    from hvd_lb.launch.rank import train

    end: Callable[[int], NoReturn] = os._exit
    if launching:
        launching.end_with_it()
        end = launching.end
    train.main(json.dumps(job), world.rank, ranks[world.rank]["host"], cores_of(ranks, world.rank), end)
    end(0)


def describe(world: World) -> dict[str, Any]:
    """What this rank is and has, as JSON values. `gpu` is the one it would take, None where it has none."""
    import torch

    there = gpus(os.environ) if torch.cuda.is_available() else []
    index = world.local_rank if len(there) > 1 else 0
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "host": socket.gethostname(),
        "bound": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "cores": usable_cores(),
        "cpu": {
            **describe_cpu(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            **kernel_variables(),
        },
        "gpu": there[index] if index < len(there) else None,
        "arguments": hashlib.sha256("\0".join(sys.argv[1:]).encode("utf-8", "surrogateescape")).hexdigest(),
        "versions": {**versions(), "python": python, "Horovod built as": json.dumps(horovod_build())},
    }


def _hear(world: World, launching: LaunchingProcess | None) -> dict[str, Any] | int:
    """The job; or the status by which all end, as there is none."""
    told = b""
    while not told:
        own = launching.job(_PLANNING_SECONDS) if launching else b""
        told = world.broadcast_bytes(own, "hvd_lb.job")
    job: dict[str, Any] | int = json.loads(told)
    return job


def _prepare(job: dict[str, Any], world: World, ranks: Sequence[dict[str, Any]]) -> None:
    """As `rank.entry` prepares a rank of our own, as far as that can be done once it has met the others."""
    for name, value in job["environment"].items():
        os.environ.setdefault(name, value)
    own = ranks[world.rank]
    here = [number for number, rank in enumerate(ranks) if rank["host"] == own["host"]]
    buses = [ranks[number]["gpu"]["bus"] for number in here] if job["device"] == "cuda" else []
    pinned = pin(here.index(world.rank), len(here), buses) if job["pin"] else ""
    logs = Path(job["output"]) / "logs"
    try:
        write_to(logs / log_name(world.rank, own["host"]))
    except FileNotFoundError:
        raise UserError(
            f"there is no {logs} here, which rank 0 has made: --output has to be in a folder that all hosts share"
        ) from None
    if pinned:
        print(pinned, flush=True)
