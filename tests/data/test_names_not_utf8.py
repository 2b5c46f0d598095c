"""Names of files and classes may be any bytes: they are kept as they are, and what is written is text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import same_images
from hvd_lb.data.prepare.export import export
from hvd_lb.data.prepare.pack import pack
from hvd_lb.data.sources.folders import NoImages
from hvd_lb.errors import UserError

CLASSES = [os.fsdecode(b"b\xe9e"), os.fsdecode(b"\xff\xfe")]


@pytest.fixture
def folder(tmp_path: Path, make_classes: Callable[..., Path]) -> Path:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe4"))
    for split in ("train", "val"):
        make_classes(folder / split, dict.fromkeys(CLASSES, 3))
        (folder / split / CLASSES[0] / "0.png").rename(folder / split / CLASSES[0] / os.fsdecode(b"\xf6.png"))
    return folder


def test_folders_shards_and_lists(folder: Path, tmp_path: Path) -> None:
    data = open_dataset(str(folder))
    assert data.train.classes == CLASSES
    assert os.fsencode(data.train.name(2)).endswith(b"/train/b\xe9e/\xf6.png")
    for again in range(2):  # made, and from the cache
        assert open_dataset(str(folder)).fingerprint() == data.fingerprint(), again
    pack(data, tmp_path / "packed", source=str(folder))
    export(open_dataset(str(tmp_path / "packed")), tmp_path / "out")
    lines = b"".join(
        os.fsencode(f"{data.train.name(i)},{CLASSES[data.train.labels[i]]}\n") for i in range(len(data.train))
    )
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_bytes(lines)
    for place in ("packed", "out", "train.csv"):
        other = open_dataset(str(tmp_path / place))
        assert other.train.classes == CLASSES
        if place != "train.csv":
            assert same_images(other.fingerprint(), data.fingerprint())
        for one, read in zip(data.train.read(np.arange(6)), other.train.read(np.arange(6)), strict=True):
            assert place == "out" or one.tobytes() == read.tobytes()
    held_out = open_dataset(str(folder / "train"), val_fraction=0.5)
    assert len(held_out.train) + len(held_out.val) == 6


def test_what_is_written_is_text(folder: Path, tmp_path: Path) -> None:
    pack(open_dataset(str(folder)), tmp_path / "packed", source=str(folder))
    written = [path for path in tmp_path.rglob("*.json*") if path.is_file()]
    assert {"classes.json", "manifest.json", "facts.json", "places.json"} <= {path.name for path in written}
    for path in written:
        json.loads(path.read_text("utf-8", errors="strict"))
    assert json.loads((tmp_path / "packed" / "classes.json").read_text())["classes"] == CLASSES


def test_errors_name_them(folder: Path) -> None:
    (folder / "train" / CLASSES[1] / os.fsdecode(b"\xdf.txt")).touch()
    with pytest.raises(NoImages, match="no image file"):
        open_dataset(str(folder))
    (folder / "train" / CLASSES[1] / os.fsdecode(b"\xdf.txt")).unlink()
    (folder / "val" / CLASSES[1]).rename(folder / "val" / os.fsdecode(b"\xfd"))
    with pytest.raises(UserError, match="has classes that are not among the 2 of the training images"):
        open_dataset(str(folder))
