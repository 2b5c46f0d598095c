"""The cached index: used when nothing changed, made anew when anything did, never trusted when damaged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.files.rows import ROW, Table
from hvd_lb.data.images import Dataset, Progress
from hvd_lb.data.index.images import IndexedImages
from hvd_lb.data.index.index import Check, Index
from hvd_lb.data.index.index import open_index as open_source
from hvd_lb.data.index.store import facts_of
from hvd_lb.data.options import OnBadImage
from hvd_lb.data.sources.folders import FolderSource
from hvd_lb.errors import UserError
from hvd_lb.machine.cache_folder import cache_folder

Make = Callable[..., Path]


class Reads:
    """Counts how often headers were read, by the progress it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def __call__(self, label: str, done: int, total: int) -> None:
        self.told.append((label, done, total))


def source(folder: Path, cheap: int = 20_000) -> FolderSource:
    return FolderSource(folder, folder, "all", cheap)


def open_index(
    folder: Path,
    on_progress: Progress | None = None,
    on_bad_image: OnBadImage = "fail",
    *,
    cheap: int = 20_000,
    check: Check = "quick",
    write_beside: bool = False,
) -> Index:
    of = source(folder, cheap)
    return open_source(of, on_progress, on_bad_image, check=check, write_beside=write_beside)


@pytest.fixture
def folder(tmp_path: Path, make_classes: Make) -> Path:
    return make_classes(tmp_path / "pictures", {"ant": 5, "bee": 300})


def cached() -> list[Path]:
    return [path for path in (cache_folder() / "index").glob("*/*") if path.is_dir()]


def test_progress_is_told_and_the_second_time_reads_nothing(folder: Path) -> None:
    first, second = Reads(), Reads()
    made, loaded = open_index(folder, first), open_index(folder, second)
    assert first.told == [
        ("reading image sizes in pictures", 256, 305),
        ("reading image sizes in pictures", 305, 305),
    ]
    assert second.told == []
    assert made.classes == loaded.classes == ["ant", "bee"]
    for name in ("labels", "widths", "heights", "rows", "names"):
        np.testing.assert_array_equal(getattr(made, name), getattr(loaded, name))
    assert isinstance(loaded.rows, np.memmap)
    assert loaded.path(304) == str(folder / "bee" / "99.JPEG")
    assert (loaded.labels.dtype, loaded.widths.dtype, loaded.heights.dtype) == (np.int64, np.int32, np.int32)


def touch(folder: Path) -> None:
    os.utime(folder / "ant" / "0.png", ns=(0, 123_456_789))


def remove(folder: Path) -> None:
    (folder / "ant" / "0.png").unlink()


def rename(folder: Path) -> None:
    (folder / "ant" / "0.png").rename(folder / "ant" / "00.png")


def add_class(folder: Path) -> None:
    (folder / "cat").mkdir()


@pytest.mark.parametrize("change", [touch, remove, rename, add_class])
def test_any_change_makes_a_new_index_and_drops_the_old(change: Callable[[Path], None], folder: Path) -> None:
    open_index(folder)
    (old,) = cached()
    change(folder)
    reads = Reads()
    open_index(folder, reads)
    assert reads.told
    assert len(cached()) == 1
    assert cached() != [old]


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "missing", "json", "other", "a row less", "a name less"]
)
def test_a_damaged_cache_is_made_again(damage: str, folder: Path) -> None:
    expected = open_index(folder).widths.tolist()
    (cache,) = cached()
    rows = cache / "rows.npy"
    if damage == "truncated":
        rows.write_bytes(rows.read_bytes()[:-40])
    elif damage == "emptied":
        rows.write_bytes(b"")
    elif damage == "missing":
        rows.unlink()
    elif damage == "json":
        (cache / "facts.json").write_text("{")
    elif damage == "a row less":
        np.save(rows, np.load(rows)[:-1])
    elif damage == "a name less":
        np.save(cache / "names.npy", np.load(cache / "names.npy")[:-1])
    else:
        np.save(rows, np.zeros(3, np.int32))
    reads = Reads()
    assert open_index(folder, reads).widths.tolist() == expected
    assert reads.told
    assert open_index(folder).widths.tolist() == expected


def test_it_works_without_a_place_for_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", "/proc/nothing-can-be-made-here")
    assert len(open_index(folder).labels) == 305


def test_broken_headers_are_refused_or_kept_without_a_size(folder: Path) -> None:
    (folder / "ant" / "0.png").write_text("broken")
    (folder / "bee" / "1.JPEG").write_bytes(b"")
    for _ in range(2):  # made, and from the cache
        with pytest.raises(UserError, match=r"ant/0.png: .* --on-bad-image skip \(2 such files in"):
            open_index(folder)
        index = open_index(folder, on_bad_image="skip")
        assert index.facts.broken == 2
        broken = np.flatnonzero(index.widths == 0)
        assert [Path(index.path(int(i))).name for i in broken] == ["0.png", "1.JPEG"]
        assert (index.heights[broken] == 0).all()


def test_the_first_broken_file_is_named_whichever_was_found_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ant/0.png", "bee/1.JPEG"):
        (folder / name).write_text("broken")
    monkeypatch.setattr("hvd_lb.data.files.rows.in_threads", lambda work, items: map(work, [*items][::-1]))
    with pytest.raises(UserError, match=r"ant/0.png: .* \(2 such files in"):
        open_index(folder)


def test_a_header_that_the_file_system_does_not_give_is_no_broken_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pread", fails)
    with pytest.raises(UserError, match=r": cannot be read \(Input/output error, 3 times\)"):
        open_index(folder, on_bad_image="skip")
    assert not cached()


def test_a_pipe_among_the_images_is_named(folder: Path) -> None:
    os.mkfifo(folder / "ant" / "pipe.jpg")
    with pytest.raises(UserError, match="ant/pipe.jpg: is no file"):
        open_index(folder)


def test_a_broken_file_that_was_repaired_in_place_is_looked_at_again(folder: Path) -> None:
    """Neither the folders nor the list of files tell of it."""
    good = (folder / "ant" / "0.png").read_bytes()
    (folder / "ant" / "0.png").write_bytes(b"broken")
    old(folder)
    with pytest.raises(UserError, match=r"ant/0.png: .* --on-bad-image skip"):
        open_index(folder, cheap=0)
    (folder / "ant" / "0.png").write_bytes(good)
    assert open_index(folder, cheap=0).facts.broken == 0


def test_names_that_are_no_text_are_kept(tmp_path: Path, folder: Path) -> None:
    strange = os.fsencode(folder / "ant") + b"/\xff\xfe.png"
    os.rename(folder / "ant" / "0.png", strange)
    index = open_index(folder)
    assert strange in [os.fsencode(index.path(i)) for i in range(5)]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("HVD_LB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hvd-lb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "hvd-lb"


def old(folder: Path) -> None:
    """Let all seem to be made long ago: what is younger than the clocks' grain counts as changed."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, ns=(10**18, 10**18))


def test_of_a_large_folder_only_the_folders_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old(folder)
    open_index(folder, cheap=0)
    monkeypatch.setattr(FolderSource, "listing", lambda self: pytest.fail("the files were listed"))
    assert len(open_index(folder, cheap=0).rows) == 305
    assert len(open_index(folder, cheap=0, check="none").rows) == 305


@pytest.mark.parametrize("change", [remove, rename, add_class])
def test_files_that_come_or_go_are_noticed_in_a_large_folder(
    change: Callable[[Path], None], folder: Path
) -> None:
    old(folder)
    before = open_index(folder, cheap=0)
    change(folder)
    reads = Reads()
    after = open_index(folder, reads, cheap=0)
    assert reads.told
    assert after.identity != before.identity
    assert open_index(folder, cheap=0, check="none").identity == after.identity


def test_files_replaced_in_a_large_folder_are_noticed_when_asked_for_and_when_read(folder: Path) -> None:
    old(folder)
    open_index(folder, cheap=0)
    (folder / "ant" / "0.png").write_bytes((folder / "bee" / "0.png").read_bytes() + b"more")
    reads = Reads()
    open_index(folder, reads, cheap=0)
    assert not reads.told
    open_index(folder, reads, cheap=0, check="full")
    assert reads.told


def test_a_folder_touched_in_vain_is_listed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old(folder)
    open_index(folder, cheap=0)
    os.utime(folder / "ant", ns=(10**18, 10**18 + 5))
    reads = Reads()
    open_index(folder, reads, cheap=0)
    assert not reads.told
    monkeypatch.setattr(FolderSource, "listing", lambda self: pytest.fail("the files were listed again"))
    open_index(folder, cheap=0)


def test_what_changed_just_now_is_looked_at_again(folder: Path) -> None:
    open_index(folder, cheap=0)
    before = os.stat(folder / "ant").st_mtime_ns
    (folder / "ant" / "0.png").rename(folder / "ant" / "x.png")
    os.utime(folder / "ant", ns=(0, before))  # of the same tick of a clock
    assert open_index(folder, cheap=0).path(4).endswith("x.png")


def test_an_index_beside_the_data_is_found_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    old(folder)
    made = open_index(folder, cheap=0, write_beside=True)
    assert made.keep[0].is_relative_to(folder / ".hvd-lb-index")
    assert not cached()
    folder.rename(tmp_path / "elsewhere")
    reads = Reads()
    found = open_index(tmp_path / "elsewhere", reads, cheap=0)
    assert not reads.told
    assert found.path(0) == str(tmp_path / "elsewhere" / "ant" / "0.png")


def test_a_file_that_was_replaced_gives_no_pixels(tmp_path: Path, make_dataset: Make) -> None:
    data = open_dataset(str(make_dataset(tmp_path / "set")))
    path = Path(data.train.name(0))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"train/ant/0.png: has \d+ bytes now, but had"):
        data.train.read(np.array([0]))


def test_workers_look_at_no_file_where_the_index_is_known(
    tmp_path: Path, make_dataset: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = str(make_dataset(tmp_path / "set"))
    fingerprint = open_dataset(spec).fingerprint()
    listing = FolderSource.listing
    monkeypatch.setattr(FolderSource, "listing", lambda self: pytest.fail("the files were listed"))
    assert open_dataset(spec, expected=fingerprint).fingerprint() == fingerprint
    monkeypatch.setattr(FolderSource, "listing", listing)
    (tmp_path / "set" / "train" / "ant" / "0.png").unlink()
    assert open_dataset(spec, expected="0" * 16).fingerprint() != fingerprint


def test_the_fingerprint_is_that_of_the_arrays_and_kept(tmp_path: Path, make_dataset: Make) -> None:
    spec = str(make_dataset(tmp_path / "set"))
    data = open_dataset(spec)
    plain = Dataset(data.name, data.train, data.val).fingerprint()
    assert data.fingerprint() == plain
    (memo,) = (cache_folder() / "index").glob("*/*/fingerprint-*")
    assert memo.read_text() == plain
    memo.write_text("damaged")
    assert open_dataset(spec).fingerprint() == plain


def test_one_reads_the_headers_and_the_others_wait(folder: Path) -> None:
    reads = [Reads() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda told: open_index(folder, told), reads))
    assert len({index.identity for index in found}) == 1
    assert sum(bool(of.told) for of in reads) == 1


def test_opening_a_large_index_costs_neither_time_nor_memory(folder: Path) -> None:
    """Five million rows are 240 MB; what is touched when opening and reading a few of them is far less."""
    old(folder)
    small = open_index(folder)
    home = small.keep[0]
    count, row = 5_000_000, small.rows[0].copy()
    rows = np.lib.format.open_memmap(home / "rows.npy", "w+", ROW, (count,))
    rows[:] = row
    table = Table(small.classes, rows, small.names, [], None)
    (home / "facts.json").write_text(json.dumps(asdict(facts_of(table))))
    del rows, table
    before = resident()
    index = open_index(folder, cheap=0)
    assert len(index.rows) == count
    assert sum(index.facts.counts) == count
    rng = np.random.default_rng(0)
    positions = rng.integers(count, size=10)
    assert (index.widths[positions] == 20).all()
    assert index.path(count - 1).endswith("ant/0.png")
    assert resident() - before < 40e6
    images = IndexedImages(index)
    for _ in range(10):
        assert len(images.read(rng.integers(count, size=64))) == 64
    assert resident() - before < 40e6


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
