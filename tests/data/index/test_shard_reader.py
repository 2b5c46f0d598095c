"""Reading by offset: exact bytes for many threads with few open files, and a line when a shard has changed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.index.shard_reader import ShardReader
from hvd_lb.errors import UserError

SHARDS, SIZE = 20, 5000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        (tmp_path / f"{shard}.tar").write_bytes(np.random.default_rng(shard).bytes(SIZE))
    return tmp_path


def open_files(folder: Path) -> int:
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)


def test_many_threads_read_right_and_keep_few_files_open(folder: Path) -> None:
    shards = ShardReader(folder, [f"{shard}.tar" for shard in range(SHARDS)], most_open=3)
    expected = [(folder / f"{shard}.tar").read_bytes() for shard in range(SHARDS)]
    rng = np.random.default_rng(0)
    parts = [(int(rng.integers(SHARDS)), *sorted(rng.integers(0, SIZE, 2).tolist())) for _ in range(3000)]

    def read(part: tuple[int, int, int]) -> bool:
        shard, start, stop = part
        return shards.read(shard, start, stop - start).tobytes() == expected[shard][start:stop]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, parts))
    assert open_files(folder) == 3


def test_files_are_closed_with_the_last_reference(folder: Path) -> None:
    shards = ShardReader(folder, ["0.tar", "1.tar"])
    shards.read(1, 0, 10)
    assert open_files(folder) == 1
    del shards
    assert open_files(folder) == 0


def test_a_shard_that_was_cut_or_removed_is_named(folder: Path) -> None:
    shards = ShardReader(folder, ["0.tar", "1.tar"])
    assert len(shards.read(0, 4000, 1000)) == 1000
    os.truncate(folder / "0.tar", 4500)
    assert len(shards.read(0, 4000, 1000)) == 500
    (folder / "1.tar").unlink()
    with pytest.raises(UserError, match="1.tar: cannot be read .No such file"):
        shards.read(1, 0, 10)
