"""Reading by offset: exact bytes for many threads with few open files, and a line when a shard has changed."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.index import shard_reader
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


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets how many files this process may have open, until the end of the test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda files: resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def many(folder: Path, count: int) -> list[str]:
    names = [f"{number}.tar" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(b"%05d" % number)
    return names


def test_all_shards_stay_open(tmp_path: Path, limit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more than the soft limit would allow, and others keep what they had."""
    limit(300)
    names = many(tmp_path, 350)
    train, val = (ShardReader(tmp_path, names) for _ in range(2))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300 + 2 * 350
    for shard in range(350):
        for reader in (train, val):
            assert reader.read(shard, 0, 5).tobytes() == b"%05d" % shard
    assert open_files(tmp_path) == 700
    monkeypatch.setattr(os, "open", None)  # no file is opened again
    order = np.random.default_rng(0).permutation(350).tolist()
    assert [int(train.read(shard, 0, 5).tobytes()) for shard in order] == order
    del train
    assert open_files(tmp_path) == 350


def test_a_limit_that_suffices_or_cannot_be_raised_stays(tmp_path: Path, limit, monkeypatch) -> None:
    names = many(tmp_path, 300)
    limit(1000)
    ShardReader(tmp_path, names)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000
    limit(400)

    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    with monkeypatch.context() as patched:
        patched.setattr(resource, "setrlimit", refuse)
        reader = ShardReader(tmp_path, names)
    for shard in range(300):
        reader.read(shard, 0, 5)
    assert open_files(tmp_path) == (400 - 256) // 2


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_close_some(code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(folder, [f"{shard}.tar" for shard in range(SHARDS)])
    original, most = os.open, 6

    def limited(path: str, *arguments: object, **options: object) -> int:
        if str(path).endswith(".tar") and open_files(folder) >= most:
            raise OSError(code, os.strerror(code), path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", limited)
    for most in (6, 1):
        for shard in [*range(SHARDS), *range(SHARDS)]:
            expected = np.random.default_rng(shard).bytes(SIZE)[5:50]
            assert reader.read(shard, 5, 45).tobytes() == expected
        assert 1 <= open_files(folder) <= most
    most = 0
    with pytest.raises(UserError, match="cannot be read"):
        [reader.read(shard, 0, 5) for shard in range(SHARDS)]


def test_those_read_last_stay_open(folder: Path) -> None:
    shards = ShardReader(folder, [f"{shard}.tar" for shard in range(SHARDS)], most_open=3)
    for shard in (0, 1, 2, 0, 3):
        shards.read(shard, 0, 5)
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    there = {os.path.basename(path) for path in map(os.path.realpath, links) if path.endswith(".tar")}
    assert there == {"0.tar", "2.tar", "3.tar"}


def test_after_an_error_the_file_is_opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that has gone stale stays so."""
    shards = ShardReader(folder, ["0.tar"])
    shards.read(0, 0, 5)
    stale = shards._open[0]  # kept, so that its number is not given again
    read, failed = shard_reader.read_range, list[int]()

    def read_range(number: int, offset: int, size: int) -> np.ndarray:
        if number == stale.number:
            failed.append(number)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(number, offset, size)

    monkeypatch.setattr(shard_reader, "read_range", read_range)
    assert shards.read(0, 5, 45).tobytes() == np.random.default_rng(0).bytes(SIZE)[5:50]
    assert len(failed) == 1


def test_a_shard_that_was_cut_or_removed_is_named(folder: Path) -> None:
    shards = ShardReader(folder, ["0.tar", "1.tar"])
    assert len(shards.read(0, 4000, 1000)) == 1000
    os.truncate(folder / "0.tar", 4500)
    assert len(shards.read(0, 4000, 1000)) == 500
    (folder / "1.tar").unlink()
    with pytest.raises(UserError, match="1.tar: cannot be read .No such file"):
        shards.read(1, 0, 10)
