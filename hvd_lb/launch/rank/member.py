"""A process as a member of an elastic job: what it hears of its agent, and what it carries from one generation on.

A generation's engine is one that may fail while it begins. Gloo of torch.distributed then raises an error; Horovod ends
the process, in a thread of its own, or waits for who will not come, and so may NCCL. So that as many are left as can
be, the process then becomes a new one by `execve`, with the same number, the same agent and its state, which is in
memory without a name.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvd_lb import world as worlds
from hvd_lb.errors import ExchangeError, UserError
from hvd_lb.launch.agent.channel import hand_on_line, hear, say
from hvd_lb.launch.agent.generations import NO_STATE
from hvd_lb.launch.launch_plan import rank_command
from hvd_lb.launch.rank.names import CARRIED, MEMBER, PIXELS
from hvd_lb.training.checkpoint import Snapshot
from hvd_lb.world import World
from hvd_lb.world.engine import Engine

_SAME_SECONDS = 1.0
# For an engine to be left, which takes some hundredths: Gloo has no error for a message under way (`world.lines`).
# To abort NCCL may take longer, and so does a new process with a GPU.
_STUCK_SECONDS = {"cpu": 3.0, "cuda": 10.0}
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


@dataclass(frozen=True)
class Carried:
    """The state of a run between two generations; without a snapshot it is that at `step`, where the job begins."""

    step: int
    snapshot: Snapshot | None = None
    unfinished: bool = False  #: what follows the last step is still to be done
    repeats: bool = False  #: the next step was begun
    told: Mapping[str, dict[str, Any]] = field(default_factory=dict)  #: the last records, by kind

    def to_bytes(self) -> bytes:
        if self.snapshot is None:
            return b""
        header = json.dumps([self.unfinished, self.repeats, self.told]).encode()
        return len(header).to_bytes(8, "big") + header + self.snapshot.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, step: int) -> Carried:
        """What `to_bytes` has made; the state at `step` where that was nothing."""
        if not data:
            return cls(step)
        end = 8 + int.from_bytes(data[:8], "big")
        snapshot = Snapshot.from_bytes(data[end:])
        return cls(snapshot.step, snapshot, *json.loads(data[8:end]))


class Member:
    """This process, whose `number` in the job is never given again; it is in its first generation, or in none."""

    def __init__(self, number: int, job_file: Path):
        self.number, self._job_file = number, job_file
        there = (os.environ.get(f"HOROVOD_{name}", "") for name in ("HOSTNAME", "LOCAL_RANK", "LOCAL_SIZE"))
        self._place = os.environ.get(MEMBER) or " ".join((str(number), *there))
        #: Its place among the processes of its host, and so its GPU, as long as it lives.
        self.local_rank = int(self._place.split()[2])
        self.generation = NO_STATE if MEMBER in os.environ else 0
        self.asked = False  #: others want to join
        self.leaving = False  #: this process has been asked to go
        self._over = NO_STATE  # the newest generation of which that is known
        self._begun: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._changes = threading.Lock()
        self._again: Callable[[], None] | None = None  # while Horovod or NCCL begins
        self._asked_at, self._stuck_seconds = 0.0, 0.0
        signal.signal(signal.SIGTERM, self._leave)
        hear(self._heard)

    def inherited(self) -> Carried | None:
        """What this process carried when it was another one; None for one that has just been started."""
        if (found := os.environ.pop(CARRIED, None)) is None:
            return None
        self.generation, step, descriptor, leaving = map(int, found.split())
        if leaving:
            self.leave()
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            return Carried.from_bytes(file.read(), step)

    @property
    def is_over(self) -> bool:
        """Whether its generation has to be left."""
        return self._over >= self.generation

    def next(self, carried: Carried) -> dict[str, Any] | None:
        """Say how far this process is, and wait for the next generation; what the head says of it.

        None where this process has been asked to leave, and is to do so now.
        """
        say("awaits", generation=self.generation, step=carried.step, unfinished=carried.unfinished)
        begun = self._begun.get()
        if begun["kind"] == "dismiss":
            say("leaving")
            return None
        with self._changes:
            self.generation, self.asked = begun["generation"], False
        os.environ.update(begun["environment"])
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(
            self.generation
        )  # which keys of torch's store are its own
        return begun

    def join(self, engine: Engine, carried: Carried, device: torch.device) -> World:
        """The world of the present generation. `ExchangeError` where it is over before it has begun.

        Horovod and NCCL may wait in vain meanwhile, and are not left but with the program.
        """
        self._stuck_seconds = _STUCK_SECONDS[device.type]
        may_wait_in_vain = engine == "horovod" or device.type == "cuda"
        try:
            with self._becoming_another(carried) if may_wait_in_vain else nullcontext():
                return worlds.init(engine, may_be_cut=True, device=device, watched=True)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:
            raise ExchangeError(f"the engine does not begin ({error})") from error

    def part(self, carried: Carried, *, together: bool) -> None:
        """Leave the world there is; `together` where all of its processes do so after the same step.

        An engine that does not come to its end holds this process up no longer than a new one would take.
        """
        stuck = threading.Timer(self._stuck_seconds, self._become_another, (carried,))
        stuck.daemon = True
        stuck.start()
        (worlds.shutdown if together else worlds.abandon)()
        stuck.cancel()

    def _become_another(self, carried: Carried) -> None:
        become_another(self._place, self.generation, self._job_file, carried, self.leaving)

    def _heard(self, message: dict[str, Any]) -> None:
        """In a thread of its own."""
        match message["kind"]:
            case "over":
                with self._changes:
                    self._over = max(self._over, message["generation"])
                    if not self.is_over:
                        return
                    if self._again:
                        self._again()
                    worlds.cut()
            case "ask":
                self.asked = True
            case "begin" | "dismiss":
                self._begun.put(message)

    def leave(self) -> None:
        """Ask this process to go, as SIGTERM does."""
        self._leave(signal.SIGTERM, None)

    def _leave(self, number: int, _: Any) -> None:
        """The first SIGTERM; a second one ends this process at once."""
        if self.leaving and time.monotonic() - self._asked_at >= _SAME_SECONDS:
            os._exit(128 + number)
        if not self.leaving:
            self.leaving, self._asked_at = True, time.monotonic()
            say("notice")  # there may be no step after which it could leave

    @contextmanager
    def _becoming_another(self, carried: Carried) -> Iterator[None]:
        """Inside, when the generation is over or Horovod aborts, this process becomes another, with its state."""

        def again(*_: Any) -> None:
            self._become_another(carried)

        handler, libc = _Handler(again), ctypes.CDLL(None)
        libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        with self._changes:
            if self.is_over:
                raise ExchangeError(f"generation {self.generation} is over before it has begun")
            self._again = again
        before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
        try:
            yield
        finally:
            libc.signal(signal.SIGABRT, before)
            with self._changes:
                self._again = None


def become_another(place: str, generation: int, job_file: Path, carried: Carried, leaving: bool) -> None:
    """Replace the program of this process by its beginning; from any thread, and without Python's own end."""
    descriptor = os.memfd_create("hvd-lb state", 0)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(carried.to_bytes())
    print(f"the engine of generation {generation} is stuck: this process begins again", flush=True)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with suppress(OSError):
                os.set_inheritable(
                    int(name), False
                )  # libraries leave theirs open, and others wait for their end
    for handed_on in (descriptor, *map(int, filter(None, [os.environ.get(PIXELS)]))):
        os.set_inheritable(handed_on, True)
    environment = {
        **os.environ,
        **hand_on_line(),
        CARRIED: f"{generation} {carried.step} {descriptor} {leaving:d}",
        MEMBER: place,
    }
    os.execve(sys.executable, rank_command(job_file), environment)
