"""The cached index: used when nothing changed, made anew when anything did, never trusted when damaged."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.cache import cache_folder
from hvd_lb.data.decode import read_size
from hvd_lb.data.index import open_index
from hvd_lb.errors import UserError

Make = Callable[..., Path]


class Reads:
    """Counts how often headers were read, by the progress it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def __call__(self, label: str, done: int, total: int) -> None:
        self.told.append((label, done, total))


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
    for name in ("labels", "widths", "heights", "ends", "names"):
        np.testing.assert_array_equal(getattr(made, name), getattr(loaded, name))
    assert isinstance(loaded.widths, np.memmap)
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


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "json", "other"])
def test_a_damaged_cache_is_made_again(damage: str, folder: Path) -> None:
    expected = open_index(folder).widths.tolist()
    (cache,) = cached()
    widths = cache / "widths.npy"
    if damage == "truncated":
        widths.write_bytes(widths.read_bytes()[:-40])
    elif damage == "emptied":
        widths.write_bytes(b"")
    elif damage == "missing":
        widths.unlink()
    elif damage == "json":
        (cache / "index.json").write_text("{")
    else:
        np.save(widths, np.zeros(3, np.int32))
    reads = Reads()
    assert open_index(folder, reads).widths.tolist() == expected
    assert reads.told
    assert open_index(folder).widths.tolist() == expected


def test_it_works_without_a_place_for_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "file"))
    assert len(open_index(folder).labels) == 305


def test_broken_headers_are_refused_or_kept_without_a_size(folder: Path) -> None:
    (folder / "ant" / "0.png").write_text("broken")
    (folder / "bee" / "1.JPEG").write_bytes(b"")
    for _ in range(2):  # made, and from the cache
        with pytest.raises(UserError, match=r"ant/0.png: .* --on-bad-image skip \(2 such files in"):
            open_index(folder)
        index = open_index(folder, on_bad_image="skip")
        assert index.broken == 2
        broken = np.flatnonzero(index.widths == 0)
        assert [Path(index.path(int(i))).name for i in broken] == ["0.png", "1.JPEG"]
        assert (index.heights[broken] == 0).all()


def test_a_header_that_the_file_system_does_not_give_is_no_broken_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("PIL.Image.open", fails)
    with pytest.raises(UserError, match=r": cannot be read \(Input/output error, 3 times\)"):
        open_index(folder, on_bad_image="skip")
    assert not cached()


def test_names_that_are_no_text_are_kept(tmp_path: Path, folder: Path) -> None:
    strange = os.fsencode(folder / "ant") + b"/\xff\xfe.png"
    os.rename(folder / "ant" / "0.png", strange)
    index = open_index(folder)
    assert strange in [os.fsencode(index.path(i)) for i in range(5)]


def test_a_header_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ppm"
    path.write_bytes(b"P6 30000 30000 255\n")
    with pytest.raises(UserError, match="bomb.ppm: .*pixels"):
        read_size(str(path))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("HVD_LB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hvd-lb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "hvd-lb"
