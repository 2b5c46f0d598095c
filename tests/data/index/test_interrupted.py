"""An index that was interrupted goes on where it was, and is the index that it would have been."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tars import png, samples, write_tar

from hvd_lb.data.files import journal, rows
from hvd_lb.data.index import store
from hvd_lb.data.index.index import Index, open_index
from hvd_lb.data.sources import shards
from hvd_lb.data.sources.find import find_sources
from hvd_lb.data.sources.source import Source
from hvd_lb.errors import UserError

Make = Callable[..., Path]


def files(folder: Path) -> Source:
    (folder / "ant").mkdir(parents=True)
    for number in range(1500):
        (folder / "ant" / f"{number:04}.png").write_bytes(png(number % 7, 20 + number % 11))
    (folder / "ant" / "0003.png").write_bytes(b"broken")
    (folder / "ant" / "1499.png").write_bytes(b"broken as well")
    return find_sources(str(folder)).train


def tars(folder: Path) -> Source:
    folder.mkdir()
    for number in range(8):
        keys = [f"{number}-{key}" for key in range(number + 3)]
        write_tar(folder / f"train-{number:06}.tar", samples(keys, b"dog" if number % 3 else b"a\xffnt"))
    write_tar(folder / "train-000005.tar", [("x.png", b"broken"), ("x.cls", b"dog"), *samples(["y"], b"dog")])
    return find_sources(str(folder)).train


def same(a: Index, b: Index) -> None:
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_array_equal(a.names, b.names)
    assert a.facts == b.facts


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_SECONDS", 0.0)


@pytest.mark.parametrize(("make", "unit"), [(files, 256), (tars, 1)])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_what_was_looked_at_before_is_not_again(
    make: Callable[[Path], Source], unit: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "data")
    told: list[int] = []

    def interrupt(label: str, done: int, total: int) -> None:
        told.append(done)
        if done >= after * unit:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index(source, interrupt, "skip")
    looked: list[str] = []
    header, scan = rows._header, shards.scan_shard
    monkeypatch.setattr(rows, "_header", lambda path: (looked.append(path), header(path))[1])
    monkeypatch.setattr(shards, "scan_shard", lambda path: (looked.append(path), scan(path))[1])
    resumed = open_index(source, on_bad_image="skip")
    total = 1500 if unit > 1 else 8
    again = 1 if unit > 1 else 0  # the broken one, for its reason
    assert len(looked) == total - after * unit + again
    home = resumed.keep[0].parent
    assert not [path for path in home.iterdir() if "journal" in path.name]
    for path in home.glob("*"):
        if path.is_dir():
            path.rename(tmp_path / path.name)
    looked.clear()
    anew = open_index(source, on_bad_image="skip")
    assert len(looked) == total
    same(resumed, anew)


def test_what_has_changed_meanwhile_is_looked_at(tmp_path: Path) -> None:
    source = files(tmp_path / "data")

    def interrupt(label: str, done: int, total: int) -> None:
        if done >= 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index(source, interrupt, "skip")
    changed = tmp_path / "data" / "ant" / "0001.png"
    changed.write_bytes(png(0, 99))
    assert open_index(source, on_bad_image="skip").widths[1] == 99


def test_two_that_write_the_same_journal_do_no_harm(tmp_path: Path) -> None:
    """As they may where the file system has no locks."""
    source = files(tmp_path / "data")
    expected = open_index(source, on_bad_image="skip")
    path = store.journal(expected.keep[0])
    blocks: list[tuple[int, bytes]] = []
    with journal.Journal(path) as kept:
        for start in (0, 0, 256, 256, 100, 768):
            blocks.append((start, expected.rows[start : start + 256].tobytes()))
            kept.append(*blocks[-1])
    (expected.keep[0]).rename(tmp_path / "away")
    same(open_index(source, on_bad_image="skip"), expected)


def test_two_that_write_the_same_journal_of_shards_do_no_harm(tmp_path: Path) -> None:
    source = tars(tmp_path / "data")
    expected = open_index(source, on_bad_image="skip")
    with journal.Journal(store.journal(expected.keep[0])) as kept:
        for number in (0, 0, 1, 1, 0, 5, 2):
            scan = shards.scan_shard(tmp_path / "data" / expected.facts.shards[number])
            kept.append(number, scan.to_bytes())
    (expected.keep[0]).rename(tmp_path / "away")
    same(open_index(source, on_bad_image="skip"), expected)


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = files(tmp_path / "data")
    program = f"""if True:
        import time
        from hvd_lb.data.files import journal, rows
        from hvd_lb.data.index.index import open_index
        from hvd_lb.data.sources.find import find_sources
        header = rows._header
        rows._header = lambda path: (time.sleep(0.1), header(path))[1]
        journal._SECONDS = 0.1
        open_index(find_sources({str(tmp_path / "data")!r}).train, on_bad_image="skip")
    """
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
    home, patience = store.cached(source), time.monotonic() + 120
    while not list(home.glob("*.journal")) and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    looked: list[str] = []
    header = rows._header
    monkeypatch.setattr(rows, "_header", lambda path: (looked.append(path), header(path))[1])
    index = open_index(source, on_bad_image="skip")
    assert len(looked) <= 1500 - 256 + 1
    assert index.facts.images == 1500
    assert index.facts.broken == 2
    with pytest.raises(UserError, match=r"0003.png: .*\(2 such files"):
        open_index(source)
