"""The algorithms of `collectives` as messages on real arrays: who sends which elements to whom, in which step.

Small and slow, to be read and to prove that the sums are right and the counts are those of the closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hvd_lb.forecast.collectives import Cost, binary_blocks


@dataclass(frozen=True)
class Message:
    """Elements `start` … `stop` − 1 of `source`, which `target` adds to its own, or takes instead of them."""

    source: int
    target: int
    start: int
    stop: int
    adds: bool


Step = list[Message]


def run(steps: Iterator[Step], arrays: list[NDArray[np.int64]]) -> Cost:
    """Does all steps to the servers' arrays, in place, and counts in bytes; messages of a step happen at once."""
    itemsize = arrays[0].itemsize
    count, wire, added = 0, 0, 0
    all_sent = _none(arrays)
    for step in steps:
        sent, received, sums = _none(arrays), _none(arrays), _none(arrays)
        contents = [arrays[message.source][message.start : message.stop].copy() for message in step]
        for message, content in zip(step, contents, strict=True):
            part = arrays[message.target][message.start : message.stop]
            part[:] = part + content if message.adds else content
            length = content.size * itemsize
            sent[message.source] += length
            received[message.target] += length
            sums[message.target] += length if message.adds else 0
        count += 1
        wire += int(max(sent.max(), received.max()))
        added += int(sums.max())
        all_sent += sent
    return Cost(count, wire, added, int(all_sent.max()))


def _none(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.zeros(len(arrays), np.int64)


def _cuts(parts: int, start: int, stop: int) -> list[int]:
    return [start + (stop - start) * part // parts for part in range(parts + 1)]


def ring(servers: int, elements: int) -> Iterator[Step]:
    p, cuts = servers, _cuts(servers, 0, elements)
    for adds in (True, False):
        for turn in range(p - 1):
            parts = [(rank - turn + (0 if adds else 1)) % p for rank in range(p)]
            yield [
                Message(rank, (rank + 1) % p, cuts[part], cuts[part + 1], adds)
                for rank, part in enumerate(parts)
            ]


def halving_doubling(servers: int, elements: int) -> Iterator[Step]:
    """Binary blocks of servers 0 … s1 − 1, s1 … s1 + s2 − 1, …; the second half is the first one in a mirror."""
    blocks, first = binary_blocks(servers), 0
    steps: dict[int, Step] = {}
    bounds: list[tuple[int, list[tuple[int, int]]]] = []  # of each block: its first server, what each one has
    for size in blocks:
        have = [(0, elements)] * size
        for turn in range(size.bit_length() - 1):
            distance, after, step = size >> (turn + 1), list(have), steps.setdefault(turn + 1, [])
            for rank, (start, stop) in enumerate(have):
                middle = (start + stop) // 2
                upper = bool(rank & distance)
                mine, other = (
                    ((middle, stop), (start, middle)) if upper else ((start, middle), (middle, stop))
                )
                after[rank] = mine
                step.append(Message(first + rank, first + (rank ^ distance), *other, adds=True))
            have = after
        bounds.append((first, have))
        first += size
    for (larger_first, larger), (smaller_first, smaller) in pairwise(bounds):
        steps.setdefault(len(larger).bit_length(), []).extend(
            Message(smaller_first + rank, larger_first + other, max(a, c), min(b, d), adds=True)
            for rank, (a, b) in enumerate(smaller)
            for other, (c, d) in enumerate(larger)
            if max(a, c) < min(b, d)
        )
    for number in sorted(steps):
        yield steps[number]
    for number in sorted(steps, reverse=True):
        yield [Message(m.target, m.source, m.start, m.stop, adds=False) for m in steps[number]]


def tree(servers: int, elements: int) -> Iterator[Step]:
    levels = (servers - 1).bit_length()
    up = [
        [
            Message(rank, rank - (1 << level), 0, elements, adds=True)
            for rank in range(1 << level, servers, 2 << level)
        ]
        for level in range(levels)
    ]
    yield from up
    for step in reversed(up):
        yield [Message(m.target, m.source, m.start, m.stop, adds=False) for m in step]


def chain(gpus: int, elements: int) -> Iterator[Step]:
    """Slices move from the last GPU to the first, each GPU adding its own, one slice behind the other; then back."""
    cuts = _cuts(gpus, 0, elements)
    up: list[Step] = []
    for turn in range(2 * gpus - 2 if gpus > 1 else 0):
        pairs = ((gpu, turn - (gpus - 1 - gpu)) for gpu in range(1, gpus))
        up.append(
            [
                Message(gpu, gpu - 1, cuts[part], cuts[part + 1], adds=True)
                for gpu, part in pairs
                if 0 <= part < gpus
            ]
        )
    yield from up
    for step in reversed(up):
        yield [Message(m.target, m.source, m.start, m.stop, adds=False) for m in step]


ALGORITHMS: dict[str, Callable[[int, int], Iterator[Step]]] = {
    "ring": ring,
    "halving-doubling": halving_doubling,
    "tree": tree,
}


def three_phases(algorithm: str, servers: int, gpus: int, elements: int) -> list[Iterator[Step]]:
    """The paper's scheme between `servers` of so many GPUs; the first GPU of each server speaks for it.

    GPU i of server s is number s · gpus + i. One list of steps for each phase.
    """
    up: list[Step] = []
    down: list[Step] = []
    steps = list(chain(gpus, elements))
    for number, step in enumerate(steps):
        everywhere = [
            Message(s * gpus + m.source, s * gpus + m.target, m.start, m.stop, m.adds)
            for s in range(servers)
            for m in step
        ]
        (up if number < len(steps) // 2 else down).append(everywhere)
    between = (
        [Message(m.source * gpus, m.target * gpus, m.start, m.stop, m.adds) for m in step]
        for step in ALGORITHMS[algorithm](servers, elements)
    )
    return [iter(up), between, iter(down)]
