"""Ranges out of objects, by any number of threads: from the local cache, else from the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np

from hvd_lb.data.remote import store
from hvd_lb.data.remote.address import Address
from hvd_lb.data.remote.blocks import BLOCK, Blocks, open_blocks
from hvd_lb.data.remote.store import ObjectState

SPAN = 1 << 20
"""What is cached is fetched in pieces of so much: a request takes as long as some hundred kB do, and the neighbours of
an image are needed in the same epoch. Without a cache exactly what is read is fetched."""

MOST_REQUESTS = 256
"""So many threads may read at once: at 100 ms a request that is 2,560 images a second in each process."""

_LOCKS = 1024


class ObjectReader:
    """Objects by their names in a folder; they have to be what `states` say."""

    def __init__(self, folder: Address, names: Sequence[str], states: Sequence[ObjectState]) -> None:
        self._addresses = [folder / name for name in names]
        self._states = states
        self._blocks = open_blocks(self._addresses, states)
        self._fetching = [Lock() for _ in range(_LOCKS)]  # by place: two threads need not fetch the same

    def read(self, shard: int, offset: int, size: int) -> np.ndarray:
        """uint8 (size,), or fewer where the object ends. UserError for what cannot be read, or is another object."""
        stop = min(offset + size, self._states[shard].size)
        if stop <= offset:
            return np.empty(0, np.uint8)
        blocks = self._blocks[shard]
        if blocks is None:
            return self._fetch(shard, offset, stop)
        if (found := blocks.get(offset, stop)) is not None:
            return found
        with self._fetching[hash((shard, offset // SPAN)) % _LOCKS]:
            found = blocks.get(offset, stop)
            return self._fill(blocks, shard, offset, stop) if found is None else found

    def forget(self, shard: int, offset: int, size: int) -> None:
        """What was read there is wrong: it is fetched again."""
        if blocks := self._blocks[shard]:
            blocks.drop(offset, offset + size)

    def window(self, shard: int) -> Callable[[int, int], bytes]:
        """pread(count, position) of an object that is read from its start on: a span at once."""
        held, at = b"", 0

        def pread(count: int, position: int) -> bytes:
            nonlocal held, at
            end = at + len(held)
            if not at <= position <= end:
                held, at = b"", position // SPAN * SPAN
                end = at
            if position + count > end:
                more = self.read(shard, end, max(SPAN, position + count - end)).tobytes()
                held, at = held[position - at :] + more if position <= end else more, min(position, end)
            return held[position - at : position - at + count]

        return pread

    def _fill(self, blocks: Blocks, shard: int, offset: int, stop: int) -> np.ndarray:
        around = offset // SPAN * SPAN, min(self._states[shard].size, -(-stop // SPAN) * SPAN)
        first, last = blocks.missing(*around)
        first, last = (
            min(first, offset // BLOCK * BLOCK),
            max(last, min(around[1], -(-stop // BLOCK) * BLOCK)),
        )
        fetched = self._fetch(shard, first, last)
        blocks.put(first, fetched)
        return fetched[offset - first : stop - first].copy()  # a view would hold the span as long as it waits

    def _fetch(self, shard: int, start: int, stop: int) -> np.ndarray:
        return store.part(self._addresses[shard], start, stop, self._states[shard])
