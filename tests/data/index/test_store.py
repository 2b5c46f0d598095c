"""An outdated index is removed when nobody can be using it, and not before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.files.rows import ROW, Table
from hvd_lb.data.index import store
from hvd_lb.data.index.dataset import index_splits
from hvd_lb.data.index.hold_out import divide
from hvd_lb.data.index.index import Index, open_index
from hvd_lb.data.sources.folders import FolderSource

Make = Callable[..., Path]
MONTH = 31 * 86_400


@pytest.fixture
def folder(tmp_path: Path, make_classes: Make) -> Path:
    return make_classes(tmp_path / "pictures", {"ant": 3, "bee": 3})


def index(folder: Path, *, beside: bool = False) -> Index:
    return open_index(FolderSource(folder, folder, "all"), write_beside=beside)


def change(folder: Path) -> None:
    path = folder / "ant" / "0.png"
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


def age(home: Path, seconds: float) -> None:
    """Let all in it seem to be so much older."""
    for path in [home, *home.rglob("*")]:
        stat = path.stat()
        os.utime(path, (stat.st_atime - seconds, stat.st_mtime - seconds))


def test_what_another_machine_has_open_stays_for_a_month(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = index(folder)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(store, "_machine", lambda: "other")
        mapped = index(folder)
    assert mapped.keep == old.keep
    for _ in range(2):
        change(folder)
        new = index(folder)
        assert new.keep[0] != old.keep[0]
        assert old.keep[0].is_dir()
        np.testing.assert_array_equal(np.array(mapped.rows), np.load(old.keep[0] / "rows.npy"))
    assert open_index(FolderSource(folder, folder, "all"), check="none").identity == new.identity
    age(old.keep[0].parent, MONTH)
    change(folder)
    index(folder)
    assert not old.keep[0].exists()


def test_an_index_made_anew_under_its_name_leaves_what_another_machine_has_open(folder: Path) -> None:
    source = FolderSource(folder, folder, "all", cheap=0)
    old = open_index(source)
    (old.keep[0] / "users" / "other").touch()
    path = folder / "ant" / "0.png"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new = open_index(source, check="full")
    assert new.keep[0] == old.keep[0]
    assert new.identity != old.identity
    (aside,) = (path.parent.parent for path in old.keep[0].parent.glob("*/users/other"))
    assert aside != new.keep[0]
    np.testing.assert_array_equal(np.load(aside / "rows.npy"), np.array(old.rows))


def test_what_only_this_machine_has_open_goes_at_once(folder: Path) -> None:
    old = index(folder)
    expected = np.array(old.rows)
    change(folder)
    new = index(folder)
    assert not old.keep[0].exists()
    np.testing.assert_array_equal(old.rows["width"], expected["width"])  # still mapped
    assert [path for path in new.keep[0].parent.iterdir() if path.is_dir()] == [new.keep[0]]


def test_an_index_is_found_by_a_link_to_its_data(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(folder.name)
    assert index(tmp_path / "linked").keep == index(folder).keep


def table(names: bytes, *sizes: tuple[int, int]) -> Table:
    rows = np.zeros(len(sizes), ROW)
    rows["width"], rows["height"] = zip(*sizes, strict=True)
    return Table(["one"], rows, np.frombuffer(names, np.uint8), [], None)


def test_the_largest_image_has_most_pixels() -> None:
    """Of 50,000 × 50,000 there are more than 32 bits count."""
    for sizes, largest in (([(9, 1), (4, 4), (1, 15)], 1), ([(8, 8), (50_000, 50_000), (9, 9)], 1)):
        assert store.facts_of(table(b"", *sizes)).largest == largest


def test_the_checksum_is_over_names_and_rows() -> None:
    tables = (table(b"ab", (1, 1)), table(b"ac", (1, 1)), table(b"ab", (1, 2)))
    assert len({store.facts_of(of).sum for of in tables}) == 3


def test_beside_the_data_others_may_read_unseen(folder: Path) -> None:
    old = index(folder, beside=True)
    change(folder)
    index(folder, beside=True)
    for days in (0, 25):
        age(old.keep[0].parent, days * 86_400)
        change(folder)
        index(folder, beside=True)
        assert old.keep[0].is_dir()
    age(old.keep[0].parent, MONTH)
    change(folder)
    index(folder, beside=True)
    assert not old.keep[0].exists()


def test_other_versions_leave_no_mark(folder: Path) -> None:
    home = index(folder).keep[0].parent
    other = home / f"{'0' * 32}-2"
    other.mkdir()
    change(folder)
    index(folder)
    assert other.is_dir()
    age(home, MONTH)
    change(folder)
    index(folder)
    assert not other.exists()


def test_what_is_unfinished_goes_after_a_day(folder: Path) -> None:
    home = index(folder).keep[0].parent
    for name in ("tmpold", "tmpnew"):
        (home / name / "made").mkdir(parents=True)
    age(home / "tmpold", 2 * 86_400)
    change(folder)
    index(folder)
    assert (home / "tmpnew").is_dir()
    assert not (home / "tmpold").exists()


def test_data_that_are_again_as_they_were_have_their_old_index(folder: Path) -> None:
    """Of few images all are looked at anew then; of many it is taken as it is."""
    source = FolderSource(folder, folder, "all", cheap=0)
    path = folder / "ant" / "0.png"
    old = open_index(source, write_beside=True)
    path.rename(folder / "ant" / "00.png")
    new = open_index(source, write_beside=True)
    time.sleep(0.02)
    (folder / "ant" / "00.png").rename(path)
    assert open_index(source, write_beside=True).identity == old.identity != new.identity
    # Ranks, which compare nothing, take it as well, and its month is over.
    assert open_index(source, check="none").identity == old.identity
    assert not (old.keep[0] / "users" / "outdated").exists()


def test_who_is_slower_leaves_the_index_of_who_was_faster_alone(tmp_path: Path, make_dataset: Make) -> None:
    spec = str(make_dataset(tmp_path / "set") / "train")
    opened = open_dataset(spec, val_fraction=0.5)
    (folder,) = opened.val.index.keep
    before = {path: path.stat().st_ino for path in [folder, *folder.iterdir()]}

    def fill(made: Path) -> None:
        for path in folder.iterdir():
            if path.is_file():
                (made / path.name).write_bytes(path.read_bytes())

    store.save(folder, fill, lambda there: store.load_rows(there, "val-"))
    assert {path: path.stat().st_ino for path in [folder, *folder.iterdir()]} == before
    (folder / "val-rows.npy").write_bytes(b"damaged")
    store.save(folder, lambda made: (made / "new").touch(), lambda there: store.load_rows(there, "val-"))
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_an_index_beside_the_data_is_for_everybody(tmp_path: Path, make_dataset: Make) -> None:
    index_splits(str(make_dataset(tmp_path / "set")), write_beside=True)
    before = os.umask(0)
    os.umask(before)
    files = [path for path in (tmp_path / "set" / ".hvd-lb-index").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"rows.npy", "names.npy", "facts.json", "places.json"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~before}


def test_an_index_is_on_the_disk_before_it_has_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine whose power goes could have one of the right size, full of zeros."""
    synced, fsync = dict[int, int](), os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", noted)
    made = index(folder)
    divide(made, 0.5, 0)
    files = [path for path in made.keep[0].rglob("*.*") if path.is_file()]
    assert len(files) == 4 + 4
    for path in files:
        assert synced[path.stat().st_ino] == path.stat().st_size
        assert path.parent.stat().st_ino in synced
