"""Ranks that another launcher has started (torchrun, srun, mpirun, horovodrun), as the launching process sees them.

Each is a process of its own launcher from its beginning to its end; `hvd_lb.launch.rank.launched` is what it does. The
launching process is a child of rank 0's. It hears from rank 0 what all of them are, tells it the job, and is told how
it ended: a JSON value each, on a line.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.launch_plan import UNTOLD
from hvd_lb.machine.cpu import computes_by
from hvd_lb.machine.placement import DeviceName, Placement, check_processes
from hvd_lb.recipe import Recipe
from hvd_lb.world.engine import Engine
from hvd_lb.world.launched import Place

Rank = Mapping[str, Any]
"""What a rank says of itself: `rank.launched.describe`."""


class RankZero:
    """Rank 0, the parent of this process, at the other end of `line`."""

    def __init__(self, line: socket.socket):
        self._line, self._lines = line, line.makefile("rb")
        self._pid = os.getppid()
        self._status: int | None = None

    def met(self, seconds: float) -> bool:
        """Whether all ranks have met within so many seconds, or will not."""
        return bool(select.select([self._line], [], [], seconds)[0])

    def ranks(self) -> tuple[Engine, str, list[Rank]]:
        """The engine by which they have met, why it is that one, and what each says; EOFError where they do not."""
        engine, why, ranks = _value(self._lines.readline())
        return engine, why, ranks

    def begin(self, job: str) -> RankZero:
        with suppress(OSError):  # it has just ended
            self._line.sendall(job.replace("\n", " ").encode() + b"\n")
        return self

    def poll(self) -> int | None:
        if self._status is None and select.select([self._line], [], [], 0)[0]:
            try:
                self._status = int(_value(self._lines.readline()))
            except (EOFError, OSError):
                self._status = UNTOLD
        return self._status

    def wait(self, timeout: float) -> int:
        if self._status is None:
            select.select([self._line], [], [], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("rank 0", timeout)
        return status

    def end(self, sign: signal.Signals) -> None:
        if os.getppid() == self._pid:
            os.kill(self._pid, sign)


def hosts_of(ranks: Sequence[Rank]) -> list[Host]:
    """Where the ranks are, in their order; a host is named again where they go round."""
    return [Host(name, len(list(there))) for name, there in itertools.groupby(rank["host"] for rank in ranks)]


def cores_of(ranks: Sequence[Rank], rank: int) -> int:
    """The cores that a rank has for itself: those it is bound to, shared with all that are bound to the same."""
    own = ranks[rank]
    sharing = sum((other["host"], other["bound"]) == (own["host"], own["bound"]) for other in ranks)
    return max(1, int(own["cores"]) // sharing)


def place_ranks(
    place: Place, ranks: Sequence[Rank], device: DeviceName, recipe: Recipe, *, pin: bool
) -> Placement:
    """The ranks as they were started; UserError where they cannot share the recipe's virtual workers."""
    if place.size > recipe.gpus:
        raise UserError(
            f"{place.launcher} has started {place.size} processes, and --gpus {recipe.gpus} is for {recipe.gpus} at "
            "most: start as many, or leave --gpus out"
        )
    check_processes(place.size, recipe.gpus, recipe.fixed_group)
    return Placement(
        device,
        place.size,
        recipe.threads or min(cores_of(ranks, rank) for rank in range(place.size)),
        tuple(dict.fromkeys(rank["host"] for rank in ranks)),
        pin=pin,
        gpus=tuple(rank["gpu"]["name"] for rank in ranks) if device == "cuda" else (),
        first_host=ranks[0]["cpu"],
        hardware={
            rank["host"]: computes_by(
                rank["cpu"],
                [of["gpu"]["name"] for of in ranks if of["host"] == rank["host"]] if device == "cuda" else (),
            )
            for rank in ranks
        },
    )


def refuse_different(ranks: Sequence[Rank]) -> None:
    """UserError for a rank that was not started as rank 0."""
    for number, rank in enumerate(ranks):
        who = f"rank {number}, on {rank['host']},"
        if rank["arguments"] != ranks[0]["arguments"]:
            raise UserError(f"{who} was started with other arguments than rank 0: start all of them alike")
        for name, version in ranks[0]["versions"].items():
            if rank["versions"].get(name) != version:
                raise UserError(
                    f"{who} has {name} {rank['versions'].get(name)}, and rank 0 {version}: install the same on all"
                )


def choose_gpus(ranks: Sequence[Rank], asked: str) -> DeviceName:
    """cuda where it is asked for, or all have a GPU; UserError where not each then has one of its own."""
    without = [number for number, rank in enumerate(ranks) if rank["gpu"] is None]
    if asked == "cpu" or (asked == "auto" and len(without) == len(ranks)):
        return "cpu"
    if without:
        raise UserError(
            f"rank {without[0]}, on {ranks[without[0]]['host']}, has no GPU for itself ({len(without)} of {len(ranks)} "
            f"ranks have none): start one process for each GPU, or give --device cpu"
        )
    seen: dict[tuple[str, str], int] = {}
    for number, rank in enumerate(ranks):
        gpu = rank["gpu"]
        if gpu["mig"]:
            raise UserError(
                f"the GPU of rank {number}, on {rank['host']}, is divided into MIG instances, which NCCL does not "
                "connect: nvidia-smi -mig 0 there"
            )
        first = seen.setdefault((rank["host"], gpu["uuid"]), number)
        if first != number:
            raise UserError(
                f"ranks {first} and {number} both have GPU {gpu['bus']} of {rank['host']}: show each process one of "
                "its own, or all of them all"
            )
    return "cuda"


def _value(line: bytes) -> Any:
    if not line:
        raise EOFError
    return json.loads(line)
