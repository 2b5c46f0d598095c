"""A journal gives back what was written whole, whatever lies behind it, and is on disk when it says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvd_lb.data.files import journal as module
from hvd_lb.data.files.journal import Journal

BLOCKS = [(0, b"first"), (5, b""), (5, b"second" * 1000)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.journal"
    with Journal(path) as journal:
        for block in BLOCKS:
            journal.append(*block)
    return path


def test_what_was_written_is_read(path: Path) -> None:
    with Journal(path) as journal:
        assert list(journal.blocks()) == BLOCKS
        journal.append(9, b"more")
    assert list(Journal(path).blocks()) == [*BLOCKS, (9, b"more")]


@pytest.mark.parametrize("lost", [1, 20, 5000, 6005])
def test_what_was_cut_short_is_left_out_and_written_over(path: Path, lost: int) -> None:
    os.truncate(path, path.stat().st_size - lost)
    with Journal(path) as journal:
        whole = list(journal.blocks())
        assert whole == BLOCKS[: len(whole)]
        assert len(whole) == 2
        journal.append(7, b"again")
    assert list(Journal(path).blocks()) == [*whole, (7, b"again")]


@pytest.mark.parametrize("at", [0, 9, 15, 16, 21, 200])
def test_what_was_damaged_is_left_out(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert list(Journal(path).blocks()) == (BLOCKS[:2] if at == 200 else [])


def test_zeros_that_a_crash_has_left_are_no_blocks(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(4096))
    assert list(Journal(path).blocks()) == BLOCKS


def test_each_block_is_synced_to_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, before = list[tuple[str, int]](), path.stat().st_size

    def fsync(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    with Journal(path) as journal:
        journal.append(9, b"more")
        assert synced == [(str(path), path.stat().st_size)]
        assert path.stat().st_size == before + module._HEAD.size + len(b"more")  # and nothing is in a buffer


def test_what_takes_little_time_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 60.0)
    with Journal(tmp_path / "x.journal") as journal:
        journal.append(0, b"quick")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_nothing_is(tmp_path: Path) -> None:
    for nowhere in (tmp_path / "none" / "x.journal", tmp_path, None):
        with Journal(nowhere) as journal:
            assert list(journal.blocks()) == []
            journal.append(0, b"one")
            journal.append(1, b"two")
