"""p processes as threads of one: what the numbers do on several processes, without Horovod and in a moment.

Random numbers of torch are one stream for all threads, so this is nothing for models that draw any.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass
class Meeting:
    """Where `size` processes put their tensors, by what is done with them."""

    size: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    given: dict[tuple[str, int], dict[int, Tensor]] = field(default_factory=dict)
    broken: bool = False

    def give_up(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def give(self, key: tuple[str, int], rank: int, tensor: Tensor) -> None:
        with self.changed:
            self.given.setdefault(key, {})[rank] = tensor.clone()
            self.changed.notify_all()

    def all_of(self, key: tuple[str, int]) -> list[Tensor]:
        with self.changed:
            self.changed.wait_for(lambda: self.broken or len(self.given[key]) == self.size, timeout=60)
            if len(self.given[key]) < self.size:
                raise RuntimeError(f"not all {self.size} processes came to {key}")
            return [self.given[key][rank] for rank in range(self.size)]


@dataclass
class Exchange:
    """A reduction under way."""

    meeting: Meeting
    key: tuple[str, int]
    tensor: Tensor
    combine: Callable[[Tensor, Tensor], Tensor]

    def wait(self) -> Tensor:
        return self.tensor.copy_(reduce(self.combine, self.meeting.all_of(self.key)))


class Together:
    """The `World` of one of the threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._times = meeting, Counter[str]()
        self.rank = self.local_rank = rank
        self.size = self.local_size = meeting.size

    def _start(self, tensor: Tensor, name: str, combine: Callable[[Tensor, Tensor], Tensor]) -> Exchange:
        # The optimizers of one process are numbered, and here all are in one process.
        name = re.sub(r"optimizer\.\d+", "optimizer", name)
        self._times[name] += 1
        key = name, self._times[name]
        self._meeting.give(key, self.rank, tensor)
        return Exchange(self._meeting, key, tensor, combine)

    def room(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    def allreduce_async(self, tensor: Tensor, name: str) -> Exchange:
        return self._start(tensor, name, torch.add)

    def maximum_async(self, tensor: Tensor, name: str) -> Exchange:
        return self._start(tensor, name, torch.maximum)

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.allreduce_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        return self._start(tensor, name, lambda first, _: first).wait()

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        first = self._start(torch.frombuffer(bytearray(data), dtype=torch.uint8), name, torch.add)
        return bytes(self._meeting.all_of(first.key)[0].numpy())

    def barrier(self) -> None:
        self.allreduce(torch.zeros(1), "barrier")

    def shutdown(self) -> None:
        return None


def together(processes: int, function: Callable[[Together], Result]) -> list[Result]:
    """What `function` gives on each of so many processes, by rank."""
    meeting = Meeting(processes)

    def run(rank: int) -> Result:
        try:
            return function(Together(meeting, rank))
        except BaseException:
            meeting.give_up()  # else the others would wait for this one
            raise

    # One setting for all threads, which put it back in any order.
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with ThreadPoolExecutor(processes) as pool:
            return list(pool.map(run, range(processes)))
    finally:
        torch.use_deterministic_algorithms(deterministic)
