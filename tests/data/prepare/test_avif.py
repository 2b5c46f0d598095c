"""AVIF all the way: index, survey, verify, shards, both loaders and the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import photo, save
from loader_cases import CPU, KINDS, as_levels

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Images
from hvd_lb.data.index.dataset import open_path
from hvd_lb.data.loading.open import open_loader
from hvd_lb.data.loading.shared_pixels import shared
from hvd_lb.data.prepare.pack import pack
from hvd_lb.data.prepare.survey import survey
from hvd_lb.data.prepare.verify import verify
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch, RandomWindows

BROKEN = "broken.avif"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in train/ant, and in train/bee one whose image data were cut out; one in val/ant."""
    for split, count in (("train", 3), ("val", 1)):
        (tmp_path / "set" / split / "ant").mkdir(parents=True)
        for number in range(count):
            content = save(photo(60 + number, 50, number), "AVIF")
            (tmp_path / "set" / split / "ant" / f"{number}.AVIF").write_bytes(content)
    (tmp_path / "set/train/bee").mkdir()
    content = save(photo(70, 50), "AVIF")
    start = content.index(b"mdat") + 4
    (tmp_path / "set/train/bee" / BROKEN).write_bytes(content[:start] + bytes(len(content) - start))
    return tmp_path / "set"


def pixels(kind: str, images: Images) -> torch.Tensor:
    ids = np.arange(3)
    windows = RandomWindows(0).windows(0, ids, images.widths[ids], images.heights[ids])
    batches = [Microbatch(ids, windows)]
    with open_loader(kind, images, batches, as_levels(32), batch_size=3, device=CPU, threads=1) as loader:
        return next(loader)[0].clone()


def test_avif_is_known_everywhere(folder: Path, tmp_path: Path) -> None:
    data = open_path(str(folder))
    assert data.train.index.facts.kinds == {"AVIF": 4}
    assert data.train.widths.tolist() == [60, 61, 62, 70]
    assert survey(data.train).formats == {"AVIF RGB": 4}
    for kind in KINDS:
        assert [Path(failure.path).name for failure in verify(data.train, kind, threads=1)] == [BROKEN]
    pack(data, tmp_path / "packed", source=str(folder))
    packed = open_dataset(str(tmp_path / "packed"))
    assert [packed.train.name(number).rpartition(".")[2] for number in range(4)] == ["avif"] * 4
    cached = shared(data, "memory", "torchvision", "cpu", "test", lambda: None)
    expected = pixels("torchvision", data.train)
    for images in (data.train, packed.train, cached.train):
        for kind in KINDS:
            assert torch.equal(pixels(kind, images), expected)


def test_other_files_of_that_kind_are_named(folder: Path) -> None:
    (folder / "train/bee" / BROKEN).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    with pytest.raises(
        UserError, match=f"{BROKEN}: cannot be decoded .HEIC is not read: convert it to JPEG, PNG or"
    ):
        open_dataset(str(folder))
