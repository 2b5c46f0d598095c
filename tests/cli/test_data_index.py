"""`hvd-lb data index` as its user meets it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            Path("set", split, name).mkdir(parents=True)
            for number, kind in enumerate(("png", "jpg")):
                Image.effect_noise((30, 20), 50).save(Path("set", split, name, f"{number}.{kind}"))


def test_it_says_what_it_found_and_where_the_index_is(hvd_lb: Run) -> None:
    said = hvd_lb("data", "index", "set")
    assert said.status == 0, said.err
    train, val, place = said.out.splitlines()
    assert train.startswith("train: 4 images in 2 classes, 0.0 MB (2 JPEG, 2 PNG)")
    assert val.startswith("val: 4 images in 2 classes")
    assert place.startswith("index read in ")
    assert "cache/index/" in place
    again = hvd_lb("data", "index", "set").out.splitlines()[-1]
    assert again.startswith("index up to date")
    again = hvd_lb("data", "index", "set", "--check").out.splitlines()[-1]
    assert again.startswith("index read in ")


def test_beside_the_data_and_used_from_there(hvd_lb: Run) -> None:
    said = hvd_lb("data", "index", "set", "--beside")
    assert "set/.hvd-lb-index/train" in said.out
    Path("set").rename("moved")
    again = hvd_lb("data", "index", "moved")
    assert "index up to date" in again.out
    assert "moved/.hvd-lb-index/train" in again.out


def test_what_cannot_be_kept_beside_the_data_is_an_error(hvd_lb: Run) -> None:
    Path("set/.hvd-lb-index/val/lock").mkdir(parents=True)  # as where nothing can be written
    said = hvd_lb("data", "index", "set", "--beside")
    assert said.status == 2
    assert "set: the index could not be written beside it (is it read-only, or the disk full?)" in said.err


def test_broken_headers_are_told(hvd_lb: Run) -> None:
    Path("set/train/bee/0.png").write_bytes(b"no image")
    said = hvd_lb("data", "index", "set")
    assert said.status == 0, said.err
    assert (
        "train: 1 image with a broken header, the first: set/train/bee/0.png (no known image format)"
        in said.out
    )


def test_one_folder_of_classes_needs_no_split(hvd_lb: Run) -> None:
    said = hvd_lb("data", "index", "set/train")
    assert said.status == 0, said.err
    assert said.out.startswith("train: 4 images in 2 classes")
    said = hvd_lb("data", "index", "set/train", "--val-fraction", "0.5")
    assert [line.split(":")[0] for line in said.out.splitlines()][:2] == ["train", "val"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("digits",), "digits: needs no index"),
        (("nowhere",), "nowhere: no such folder"),
        (("set/train", "--val-fraction", "2"), "'--val-fraction': 2.0 is not in the range"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], told: str, hvd_lb: Run) -> None:
    said = hvd_lb("data", "index", *arguments)
    assert said.status == 2
    assert told in said.err
    assert said.err.count("\n") == 1
