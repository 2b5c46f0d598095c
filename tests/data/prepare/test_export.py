"""A data set as class folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import ArrayImages, Dataset, same_images
from hvd_lb.data.prepare.export import export
from hvd_lb.errors import UserError

CLASSES = ["T-shirt/top", "Trouser", "Bag"]


def some(classes: list[str] = CLASSES) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 9), dtype=np.uint8)
    images = ArrayImages(pixels, np.arange(12) % 3, classes, "noise")
    return Dataset("noise", images, images)


def test_the_folder_has_the_same_images(tmp_path: Path) -> None:
    dataset = some()
    assert export(dataset, tmp_path / "out", threads=2) == ["T-shirt-top", "Trouser", "Bag"]
    again = open_dataset(str(tmp_path / "out"))
    assert again.train.classes == ["Bag", "T-shirt-top", "Trouser"]
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]
    order = [2, 5, 8, 11, 0, 3, 6, 9, 1, 4, 7, 10]
    assert [Path(again.val.name(i)).name for i in range(12)] == [f"{i:012d}.png" for i in order]
    for split in (again.train, again.val):
        assert split.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_files_are_copied(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    dataset = open_dataset(str(make_dataset(tmp_path / "set")))
    export(dataset, tmp_path / "out")
    again = open_dataset(str(tmp_path / "out"))
    assert same_images(again.fingerprint(), dataset.fingerprint())
    for i in range(12):
        assert Path(again.train.name(i)).read_bytes() == Path(dataset.train.name(i)).read_bytes()


def test_an_interrupted_export_is_begun_anew(tmp_path: Path) -> None:
    def fails(label: str, done: int, total: int) -> None:
        if label == "exporting val":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(some(), tmp_path / "out", on_progress=fails)
    assert os.listdir(tmp_path / "out") == [".unfinished"]
    export(some(), tmp_path / "out")
    assert len(open_dataset(str(tmp_path / "out")).train) == 12


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    for name in ("..", "lost+found"):  # the latter would be ignored when the folder is read
        with pytest.raises(UserError, match=f"class {re.escape(repr(name))} cannot be the name"):
            export(some([name, "a", "b"]), tmp_path / "out")
    with pytest.raises(UserError, match="two classes would have the same folder"):
        export(some(["a/b", "a-b", "c"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(UserError, match="is not empty"):
            export(some(), target)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
