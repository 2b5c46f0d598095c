"""The cache of blocks: shared, checked, bounded, and never taken from under a reader."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.remote import store
from hvd_lb.data.remote.address import Address
from hvd_lb.data.remote.blocks import BLOCK, Blocks, _key, _write, open_blocks
from hvd_lb.data.remote.objects import ObjectReader
from hvd_lb.data.remote.store import ObjectState
from hvd_lb.errors import UserError

SIZE = 5 * BLOCK + 1000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
FOLDER = Address.of("s3://bucket/x")


def opened(names: str, size: int = SIZE, tag: int = 1) -> list[Blocks | None]:
    return open_blocks([FOLDER / name for name in names], [ObjectState(size, tag)] * len(names))


def there(names: str) -> list[str]:
    """Those of the names that have a file in the cache."""
    folder = Path(os.environ["HVD_LB_CACHE"]) / "remote"
    return [name for name in names if (folder / _key(FOLDER / name, ObjectState(SIZE, 1))).exists()]


def test_what_was_put_is_got_by_others_and_nothing_else(tmp_path: Path) -> None:
    mine, theirs = Blocks(tmp_path / "x", SIZE), Blocks(tmp_path / "x", SIZE)
    assert mine.get(0, 1) is None
    assert mine.missing(0, SIZE) == (0, SIZE)
    mine.put(2 * BLOCK, CONTENT[2 * BLOCK : 4 * BLOCK])
    mine.put(5 * BLOCK, CONTENT[5 * BLOCK :])
    for blocks in (mine, theirs, Blocks(tmp_path / "x", SIZE)):
        assert (blocks.get(2 * BLOCK + 7, 4 * BLOCK - 3) == CONTENT[2 * BLOCK + 7 : 4 * BLOCK - 3]).all()
        assert (blocks.get(SIZE - 5, SIZE) == CONTENT[-5:]).all()
        assert blocks.get(2 * BLOCK - 1, 2 * BLOCK + 1) is None
        assert blocks.get(4 * BLOCK - 1, 4 * BLOCK + 1) is None
        assert blocks.missing(2 * BLOCK, SIZE) == (4 * BLOCK, 5 * BLOCK)
        assert blocks.missing(2 * BLOCK + 1, 4 * BLOCK)[0] == blocks.missing(2 * BLOCK + 1, 4 * BLOCK)[1]


def test_damage_is_found_by_whoever_meets_the_block_first(tmp_path: Path) -> None:
    Blocks(tmp_path / "x", SIZE).put(0, CONTENT)
    content = bytearray((tmp_path / "x").read_bytes())
    content[-SIZE + BLOCK + 5] ^= 1
    (tmp_path / "x").write_bytes(content)
    blocks = Blocks(tmp_path / "x", SIZE)
    assert blocks.get(0, BLOCK) is not None
    assert blocks.get(BLOCK, BLOCK + 1) is None
    assert blocks.missing(0, SIZE) == (BLOCK, 2 * BLOCK)
    blocks.put(BLOCK, CONTENT[BLOCK : 2 * BLOCK])
    assert (Blocks(tmp_path / "x", SIZE).get(0, SIZE) == CONTENT).all()


def test_a_block_whose_checksum_is_0_is_there(tmp_path: Path) -> None:
    content = np.frombuffer(b"\x9d\x0a\xd9\x6d", np.uint8)
    assert zlib.crc32(content.data) == 0
    Blocks(tmp_path / "x", 4).put(0, content)
    assert Blocks(tmp_path / "x", 4).get(0, 4) is not None


def test_no_block_is_announced_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process would take it for damaged, and throw the checksum away."""
    blocks, write, written = Blocks(tmp_path / "x", SIZE), _write, list[int]()

    def half(descriptor: int, content: memoryview, offset: int) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(content))
        write(descriptor, content, offset)

    monkeypatch.setattr("hvd_lb.data.remote.blocks._write", half)
    blocks.put(0, CONTENT)
    assert written
    assert blocks.missing(0, SIZE) == (0, SIZE)


def test_the_use_of_blocks_is_noted() -> None:
    for again in (False, True):
        (blocks,) = opened("a")
        assert blocks
        assert not again or os.fstat(blocks._descriptor).st_mtime > 1
        os.utime(blocks._descriptor, (1, 1))


def test_what_another_thread_has_fetched_meanwhile_is_not_fetched_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = ObjectReader(FOLDER, ["a"], [ObjectState(SIZE, 1)])
    (blocks,) = reader._blocks
    assert blocks
    get = blocks.get

    def at_first_nothing(start: int, stop: int) -> np.ndarray | None:
        monkeypatch.setattr(blocks, "get", get)
        blocks.put(0, CONTENT)
        return None

    monkeypatch.setattr(blocks, "get", at_first_nothing)
    monkeypatch.setattr(store, "part", lambda *_: pytest.fail("fetched again"))
    assert (reader.read(0, 5, 9) == CONTENT[5:14]).all()


def test_another_version_of_an_object_has_blocks_of_its_own() -> None:
    (old,), (new,) = opened("a"), opened("a", tag=2)
    assert old
    assert new
    old.put(0, CONTENT)
    assert new.get(0, 1) is None


def test_room_is_made_of_what_nobody_uses_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", f"{3.5 * SIZE / 1e3}kB")
    used = opened("a")
    for age, name in enumerate("abc"):
        (blocks,) = opened(name)
        assert blocks
        blocks.put(0, CONTENT)
        os.utime(blocks._descriptor, (age + 1, age + 1))
        del blocks
    assert opened("d") != [None]
    assert there("abcd") == ["a", "c", "d"]  # b was the oldest that was not in use
    del used


def test_the_first_objects_that_fit_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", f"{2.5 * SIZE / 1e3}kB")
    first = opened("abcd")
    assert [of is not None for of in first] == [True, True, False, False]
    assert [of is not None for of in opened("abcd")] == [
        True,
        True,
        False,
        False,
    ]  # another process of the run
    assert opened("e") == [None]  # all is in use
    del first


@pytest.mark.parametrize(("limit", "cached"), [("0", False), ("1TB", True), ("", True), ("1.5 MB", True)])
def test_limits(limit: str, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", limit)
    assert (opened("a") != [None]) is cached


@pytest.mark.parametrize("limit", ["much", "-1GB", "1 light year", "inf", "nan"])
def test_limits_that_are_none(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_DATA_CACHE", limit)
    with pytest.raises(UserError, match=f"HVD_LB_DATA_CACHE is '{limit}': expected a size such as 200GB"):
        opened("a")


def test_a_folder_that_cannot_be_written_means_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("hvd_lb.data.remote.blocks.cache_folder", lambda: tmp_path / "file")
    assert opened("a") == [None]
    assert "remote data are not cached (Not a directory)" in capfd.readouterr().err
