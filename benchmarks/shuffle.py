"""A rank's indices of an epoch: the permutation by position against torch's DistributedSampler, in one run.

Prints the time to the first index, indices per second and the memory each holds, at --images for both and at
--huge for ours alone (the sampler would need 8 bytes an image and more while it shuffles).

    python benchmarks/shuffle.py [--images 10000000] [--huge 1000000000]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from hvd_lb.plan.shuffle import Permutation

RANKS, BATCH, TAKEN = 8, 256, 2_000_000
Figures = tuple[float, float, float]  # seconds to the first, indices a second, bytes


class Sized(torch.utils.data.Dataset[int]):
    def __init__(self, images: int):
        self._images = images

    def __len__(self) -> int:
        return self._images


def resident() -> int:
    """Bytes of this process in memory, those of its files left out."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096


def by_position(images: int) -> Figures:
    """Rank 0's share, in the slices in which a loader takes them."""
    Permutation(1000, 0, 0).slice(0, 1000)  # numpy's own first use
    before, began = resident(), time.perf_counter()
    permutation = Permutation(images, 0, 0)
    permutation.slice(0, 1)
    first = time.perf_counter() - began
    began, peak = time.perf_counter(), 0
    for start in range(0, TAKEN * RANKS, BATCH * RANKS * 64):
        permutation(np.arange(start, start + BATCH * 64) % images)
        peak = max(peak, resident() - before)
    return first, TAKEN / (time.perf_counter() - began), peak


def by_sampler(images: int) -> Figures:
    sampler = DistributedSampler(Sized(images), num_replicas=RANKS, rank=0, shuffle=True)
    before, began = resident(), time.perf_counter()
    sampler.set_epoch(1)
    indices = iter(sampler)
    next(indices)
    first = time.perf_counter() - began
    peak = resident() - before
    began = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(indices, min(TAKEN, images // RANKS - 1)))
    return first, taken / (time.perf_counter() - began), max(peak, resident() - before)


def alone(measure: Callable[[int], Figures], images: int) -> Figures:
    """Measured in a process of its own: what one allocates is not another's."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_send, args=(there, measure, images))
    process.start()
    figures: Figures = here.recv()
    process.join()
    return figures


def _send(to: Connection, measure: Callable[[int], Figures], images: int) -> None:
    to.send(measure(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=10**7)
    parser.add_argument("--huge", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sides = {
        f"by position, {arguments.images:,} images": (by_position, arguments.images),
        f"DistributedSampler, {arguments.images:,} images": (by_sampler, arguments.images),
        f"by position, {arguments.huge:,} images": (by_position, arguments.huge),
    }
    medians = {}
    for name, (measure, images) in sides.items():
        rounds = [alone(measure, images) for _ in range(arguments.rounds)]
        medians[name] = [statistics.median(figures) for figures in zip(*rounds, strict=True)]
        first, rate, memory = medians[name]
        print(f"{name}: first {first * 1e3:,.3f} ms, {rate / 1e6:,.1f} M indices/s, {memory / 1e6:,.1f} MB")
    ours, theirs = list(medians.values())[:2]
    share = arguments.images / RANKS
    whole = [first + share / rate for first, rate, _ in (ours, theirs)]
    print(
        f"ratios to DistributedSampler: first index {theirs[0] / ours[0]:,.0f} times sooner, "
        f"{ours[1] / theirs[1]:.1f} times its indices/s once it has shuffled, "
        f"a rank's whole share of the epoch {whole[1] / whole[0]:.0f} times as fast"
    )


if __name__ == "__main__":
    main()
