"""Images of an index: read from files of their own, or from shards, in any order and by several threads at once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hvd_lb.data.files.reading import read_file
from hvd_lb.data.files.rows import head_sum
from hvd_lb.data.files.threads import MOST_THREADS
from hvd_lb.data.index.index import Index
from hvd_lb.data.index.shard_reader import ShardReader
from hvd_lb.data.remote.objects import MOST_REQUESTS, ObjectReader
from hvd_lb.data.remote.store import ObjectState
from hvd_lb.errors import UserError

# The kernel maps up to a megabyte around a row: a thousand random ones can be all of an index. Forgetting them costs
# some microseconds an image.
_FORGET_EVERY = 64


class IndexedImages:
    """The images of an index, in its order; `largest` is the position of the one with most pixels, `most_threads` how
    many reads at once their place is asked for.
    """

    encoded = True

    def __init__(self, index: Index) -> None:
        self.index = index
        self.classes = index.classes
        self.labels = index.labels
        self.widths = index.widths
        self.heights = index.heights
        self.largest = index.facts.largest
        self._unforgotten = 0
        self._shards = _reader(index)
        self.most_threads = MOST_THREADS if isinstance(index.root, Path) else MOST_REQUESTS

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        contents = [self._read(int(image_id)) for image_id in ids]
        self._unforgotten += len(ids)
        if self._unforgotten >= _FORGET_EVERY:
            self._unforgotten = 0
            self.index.forget()
        return contents

    def name(self, image_id: int) -> str:
        return self.index.path(image_id)

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        rows = self.index.rows[start:stop]
        names, lengths = self.index.names_of(start, stop)
        shards = b"\0".join(map(os.fsencode, self.index.facts.shards)) if start == 0 else b""
        contents = (rows[name].tobytes() for name in ("size", "head"))
        places = (rows["offset"].tobytes(), rows["shard"].tobytes(), lengths.tobytes(), names, shards)
        return b"".join(contents), b"".join(places)

    def _read(self, image_id: int) -> np.ndarray:
        row = self.index.rows[image_id]
        size, shard, offset = int(row["size"]), int(row["shard"]), int(row["offset"])
        in_shard = shard >= 0
        content = self._shards.read(shard, offset, size) if in_shard else read_file(self.name(image_id))
        if len(content) != size:
            raise UserError(
                f"{self.name(image_id)}: has {len(content)} bytes now, but had {size} when it was indexed; leave "
                "files in use alone, and let `hvd-lb data index --check` find changes before"
            )
        if head_sum(content.data) != row["head"] and isinstance(self._shards, ObjectReader):
            self._shards.forget(shard, offset, size)  # what the cache has is not what the server has
            content = self._shards.read(shard, offset, size)
        if head_sum(content.data) != row["head"]:
            raise UserError(
                f"{self.name(image_id)}: is another file than when it was indexed, with other bytes; give "
                "`hvd-lb data index --check`, and leave files in use alone"
            )
        return content


def _reader(index: Index) -> ShardReader | ObjectReader:
    shards = index.facts.shards
    if isinstance(index.root, Path):
        return ShardReader(index.root, shards)
    return ObjectReader(index.root, shards, [ObjectState(size, tag) for tag, size in index.facts.objects])
