"""What this process does, since when and for how long: whom the others wait for, and why.

A stage is entered by whoever begins it: the trainer, and `Staged`, which is a world whose waits are stages.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_lb.world import Handle, World


class Stage(enum.StrEnum):
    STARTING = "starting"
    BETWEEN = "waiting for a generation"  #: of an elastic job, for as long as its head has the others wait
    DATA = "waiting for data"
    COMPUTE = "computing"
    NETWORK = "waiting for the other ranks"
    EVALUATION = "evaluating"
    CHECKPOINT = "saving a checkpoint"
    ENDING = "ending"


class Stages:
    """The stage of a process, in whose threads it may be read, and how long it was in those that make up a step."""

    def __init__(self) -> None:
        self.now = (Stage.STARTING, time.monotonic())  #: the stage, and since when (`time.monotonic`)
        self.step = 0  #: that is being taken, or the last one
        self.taken = 0  #: steps that this process has taken
        self._seconds = dict.fromkeys(Stage, 0.0)
        # Waits of the host for tensors on a GPU, and the events before and after them in its stream.
        self._waited, self._events = 0.0, list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    def enter(self, stage: Stage) -> None:
        """Also to say again that it goes on: a batch more, or the next of several waits."""
        before, since = self.now
        now = time.monotonic()
        self._seconds[before] += now - since
        self.now = stage, now

    @contextmanager
    def within(self, stage: Stage) -> Iterator[None]:
        """Inside it is this stage, afterwards the one before."""
        before = self.now[0]
        self.enter(stage)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """What is done inside is no part of a step: `take` leaves it out."""
        self.enter(self.now[0])
        kept = dict(self._seconds), self._waited, list(self._events)
        yield
        self.enter(self.now[0])
        self._seconds, self._waited, self._events = kept

    @contextmanager
    def waiting_for(self, tensor: Tensor) -> Iterator[None]:
        """A wait for other processes; on a GPU it begins when what was computed before is done, not the host's wait."""
        with self.within(Stage.NETWORK):
            if not tensor.is_cuda:
                yield
                return
            began, stream = time.monotonic(), torch.cuda.current_stream()
            before = stream.record_event(torch.cuda.Event(enable_timing=True))
            yield
            self._events.append((before, stream.record_event(torch.cuda.Event(enable_timing=True))))
            self._waited += time.monotonic() - began

    def take(self) -> tuple[float, float, float]:
        """Seconds of waiting for data, of computing and of waiting for other processes, since this was last asked."""
        self.enter(self.now[0])
        done = [pair for pair in self._events if pair[1].query()]
        stalled = sum(before.elapsed_time(after) for before, after in done) / 1000
        data, compute, network = (
            self._seconds[stage] for stage in (Stage.DATA, Stage.COMPUTE, Stage.NETWORK)
        )
        compute, network = compute + self._waited - stalled, network - self._waited + stalled
        self._seconds = dict.fromkeys(Stage, 0.0)
        self._waited, self._events = 0.0, self._events[len(done) :]
        return data, max(compute, 0.0), network


class StagedHandle:
    """A reduction whose wait is a stage."""

    def __init__(self, handle: Handle, stages: Stages, tensor: Tensor):
        self._handle, self._stages, self._tensor = handle, stages, tensor

    def wait(self) -> Tensor:
        with self._stages.waiting_for(self._tensor):
            return self._handle.wait()

    @property
    def done(self) -> bool:
        return self._handle.done


class Staged:
    """A world that says when this process waits for others."""

    def __init__(self, world: World, stages: Stages):
        self._world, self._stages = world, stages
        self.rank, self.size = world.rank, world.size
        self.local_rank, self.local_size = world.local_rank, world.local_size

    def room(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._world.room(name, count, dtype, device)

    def allreduce_async(self, tensor: Tensor, name: str) -> StagedHandle:
        return StagedHandle(self._world.allreduce_async(tensor, name), self._stages, tensor)

    def maximum_async(self, tensor: Tensor, name: str) -> StagedHandle:
        return StagedHandle(self._world.maximum_async(tensor, name), self._stages, tensor)

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.allreduce_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        with self._stages.waiting_for(tensor):
            return self._world.broadcast(tensor, name)

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        with self._stages.within(Stage.NETWORK):
            return self._world.broadcast_bytes(data, name)

    def barrier(self) -> None:
        with self._stages.within(Stage.NETWORK):
            self._world.barrier()

    def shutdown(self) -> None:
        self._world.shutdown()
