"""How many virtual workers are computed together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from hvd_lb.machine.limits import available_memory

# A batch of so many images keeps any device busy: groups that are found by trying are not larger.
MOST_IMAGES = 256
# Of each size: in the first runs of a new shape kernels are chosen, and graphs recorded; of the others, which are so
# many or take so many seconds together, the fastest counts.
_FIRST_RUNS, _RUNS, _SECONDS = 2, 8, 0.2
# A larger group has to be faster by so much.
_GAIN = 0.03
# What backward keeps is most of the memory that a forward takes, not all.
_MORE_MEMORY = 1.5


class GroupSize:
    """How many of a process's `workers`, of `images` each, are computed together.

    That is the number `given`; or the fastest of several that are tried in the first steps, as far as there is `room`
    for the bytes that backward keeps. `speeds` then has the images per second of each. `why` says why no group is made.

    On a CPU sizes take turns, so that what else a machine does meanwhile meets all of them. On a GPU, which is ours
    alone and where each size may record graphs of its own, they come one after the other.
    """

    def __init__(
        self,
        workers: range,
        given: int | None,
        *,
        images: int,
        device: torch.device,
        room: Callable[[], float] = lambda: math.inf,
        why: str = "",
    ):
        count = len(workers)
        self.size = max(1, min(given or 1, count))
        self.speeds: dict[int, float] = {}
        self.why = why
        self._first, self._images, self._device, self._room = workers.start, images, device, room
        halves = {-(-count // (1 << times)) for times in range(count.bit_length())}
        larger = sorted(size for size in halves if 1 < size <= MOST_IMAGES / images)
        # The seconds of each run, by the size that is tried.
        self._runs: dict[int, list[float]] = (
            {size: [] for size in [1, *larger]} if larger and not given else {}
        )
        self._kept = 0  # bytes of one worker

    @property
    def searching(self) -> bool:
        return bool(self._runs)

    @property
    def most(self) -> int:
        """The largest that may come."""
        return max([self.size, *self._runs])

    def groups(self, workers: Sequence[int]) -> Iterator[list[int]]:
        """The `workers` of a step (a short one has not all) in groups, each of the size that is the right one then.

        A group begins at a multiple of its size, counted from the process's first worker, once that is settled.
        """
        rest = list(workers)
        while rest:
            if self.searching:
                self._choose(len(rest))
                group = rest[: self.size]
            else:
                place = (rest[0] - self._first) // self.size
                group = [worker for worker in rest if (worker - self._first) // self.size == place]
            yield group
            del rest[: len(group)]

    def _choose(self, most: int) -> None:
        """Which size of at most so many workers is tried next: of those that are not known the one with the fewest
        runs, or the smallest.
        """
        sizes = [size for size in self._runs if size <= most]
        unknown = [size for size in sizes if not self._known(size)]
        in_turns = self._device.type == "cpu"
        self.size = min(
            unknown, key=lambda size: (in_turns and len(self._runs[size]), size), default=max(sizes)
        )
        if self.size > 1 and not self._runs[self.size] and not self._fits(self.size):
            self.drop(self.size)
            self._choose(most)

    def _known(self, size: int) -> bool:
        counted = self._runs[size][_FIRST_RUNS:]
        return len(counted) >= _RUNS and sum(counted) >= _SECONDS

    def drop(self, least: int) -> None:
        """There is no room for groups of so many workers or more, of several."""
        self._runs = {size: runs for size, runs in self._runs.items() if size < max(least, 2)}

    @contextmanager
    def timed(self, images: int) -> Iterator[None]:
        """Around forward and backward of a group with so many images."""
        if not self.searching or images != self.size * self._images:
            yield
            return
        self._wait()
        began = time.perf_counter()
        with self._kept_noted() if not self._kept else nullcontext():
            yield
        self._wait()
        if self.size in self._runs:
            self._runs[self.size].append(time.perf_counter() - began)
            if all(map(self._known, self._runs)):
                self._settle()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _settle(self) -> None:
        self.speeds = {
            size: size * self._images / min(runs[_FIRST_RUNS:]) for size, runs in self._runs.items()
        }
        fast = max(self.speeds.values()) * (1 - _GAIN)
        self.size = min(size for size, speed in self.speeds.items() if speed >= fast)
        self._runs = {}

    def _fits(self, size: int) -> bool:
        return size * self._kept * _MORE_MEMORY <= self._room()

    @contextmanager
    def _kept_noted(self) -> Iterator[None]:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself would keep an output alive, which keeps it

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self._kept = sum(storages.values())


def room_for_groups(device: torch.device, processes_here: int) -> float:
    """Bytes that a process may take for what backward keeps of a group, as one of several on this machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is kept then is in use, or belongs to recorded graphs
        return torch.cuda.mem_get_info(device)[0]
    try:
        return available_memory() / processes_here
    except OSError:  # no Linux
        return math.inf
