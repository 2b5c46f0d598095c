"""Allreduces of several sizes between all processes, as the gradients of a step make them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hvd_lb.world import World

SIZES = (1 << 10, 16 << 10, 256 << 10, 4 << 20, 64 << 20)  #: bytes
_SECONDS = 1.0  # for the repetitions of one size
_MOST_REPETITIONS = 20
_LONGEST = 10.0  # a size that would take longer is left out


def time_allreduces(
    world: World, device: torch.device, sizes: Sequence[int] = SIZES
) -> list[tuple[int, float]]:
    """(bytes, seconds) of each size: the median over repetitions of the slowest process's time; collective."""
    found: list[tuple[int, float]] = []
    for size in sizes:
        if found and found[-1][1] * size / found[-1][0] > _LONGEST:
            break
        tensor = torch.zeros(size // 4, device=device)
        first = _slowest(world, [_seconds(world, tensor, f"warm.{size}")], size)[0]
        repetitions = max(1, min(_MOST_REPETITIONS, int(_SECONDS / first)))
        seconds = [_seconds(world, tensor, f"timed.{size}") for _ in range(repetitions)]
        found.append((size, sorted(_slowest(world, seconds, size))[repetitions // 2]))
    return found


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
