"""Allreduces of several sizes between all processes, as the gradients of a step make them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hvd_lb.world import World

SIZES = (1 << 10, 16 << 10, 256 << 10, 4 << 20, 64 << 20)  #: bytes
_SECONDS = 1.0  # for the repetitions of one size
_MOST_REPETITIONS = 20
_LONGEST = 10.0  # a size that would take longer is left out
_ROUNDS = 3  # of an exchange alone, computing alone, and both
_WORK = 192  # rows of the matrix whose square is computed, in a fraction of a millisecond


def time_allreduces(
    world: World, device: torch.device, sizes: Sequence[int] = SIZES
) -> list[tuple[int, float]]:
    """(bytes, seconds) of each size: the median over repetitions of the slowest process's time; collective."""
    found: list[tuple[int, float]] = []
    for size in sizes:
        if found and found[-1][1] * size / found[-1][0] > _LONGEST:
            break
        tensor = world.room(f"network.{size}", size // 4, torch.float32, device)
        first = _slowest(world, [_seconds(world, tensor, f"warm.{size}")], size)[0]
        repetitions = max(1, min(_MOST_REPETITIONS, int(_SECONDS / first)))
        seconds = [_seconds(world, tensor, f"timed.{size}") for _ in range(repetitions)]
        found.append((size, sorted(_slowest(world, seconds, size))[repetitions // 2]))
    return found


def time_beside_computing(world: World, measured: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """How many times as long an allreduce takes beside computing on the CPU, and computing beside an allreduce.

    At least 1, of the slowest process; `measured` is what `time_allreduces` has found, of which the largest size is
    taken that is soon done. Collective.
    """
    size, seconds = max((one for one in measured if one[1] <= _SECONDS / 2), default=measured[0])
    repetitions = max(1, int(_SECONDS / 2 / seconds))
    tensor = world.room("network.beside", size // 4, torch.float32, torch.device("cpu"))
    matrix = torch.zeros(_WORK, _WORK)

    def exchange() -> float:
        world.barrier()
        began = time.perf_counter()
        for _ in range(repetitions):
            world.allreduce(tensor, "beside")
        return time.perf_counter() - began

    def computed(until: Callable[[], bool]) -> float:
        """Seconds for one unit of work."""
        began, units = time.perf_counter(), 0
        while not (units and until()):
            torch.mm(matrix, matrix)
            units += 1
        return (time.perf_counter() - began) / units

    def both() -> tuple[float, float]:
        with ThreadPoolExecutor(1) as pool:
            exchanged = pool.submit(exchange)
            unit = computed(exchanged.done)
            return exchanged.result(), unit

    exchanges, units = [], []
    for _ in range(_ROUNDS):
        alone = exchange()
        unit_alone = computed(_after(alone))
        beside, unit_beside = both()
        exchanges.append(beside / alone)
        units.append(unit_beside / unit_alone)
    found = _slowest(world, [statistics.median(exchanges), statistics.median(units)], size)
    return max(1.0, found[0]), max(1.0, found[1])


def _after(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def bus_bandwidth(size: int, seconds: float, processes: int) -> float:
    """Bytes per second that each process sends in a ring, and receives: 2 (p − 1) / p · n / t, as in nccl-tests."""
    return 2 * (processes - 1) / processes * size / seconds


def _seconds(world: World, tensor: torch.Tensor, name: str) -> float:
    world.barrier()
    began = time.perf_counter()
    world.allreduce(tensor, name)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - began


def _slowest(world: World, seconds: list[float], size: int) -> list[float]:
    times = torch.tensor(seconds, dtype=torch.float64)
    slowest: list[float] = world.maximum_async(times, f"slowest.{size}").wait().tolist()
    return slowest
