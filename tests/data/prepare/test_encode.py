"""Images as files: bytes kept, pixels as PNG that loses nothing, large ones shrunk."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import photo
from PIL import Image

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import ArrayImages
from hvd_lb.data.prepare.encode import Encoding, encoded_in_order
from hvd_lb.errors import UserError


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_files_keep_their_bytes_and_their_ending_in_lower_case(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    images = open_dataset(str(make_dataset(tmp_path / "set"))).train
    files = list(encoded_in_order(images, 0, Encoding(), 3))
    assert [file.content for file in files] == [Path(images.name(i)).read_bytes() for i in range(12)]
    assert [file.ending for file in files] == [".png", ".jpeg"] * 6


@pytest.mark.parametrize("shape", [(3, 8, 9), (3, 8, 9, 3)])
def test_pixels_become_png(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = ArrayImages(pixels, np.zeros(3, np.int64), ["a"], "noise")
    for i, file in enumerate(encoded_in_order(images, 0, Encoding(), 1)):
        assert file.ending == ".png"
        assert opened(file.content).mode == ("L" if len(shape) == 3 else "RGB")
        assert (np.asarray(opened(file.content)) == pixels[i]).all()


def test_only_what_is_larger_is_shrunk(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", 1) / "train" / "aardvark"
    folder.mkdir()
    for name, size in (("a", (100, 60)), ("b", (101, 60)), ("c", (60, 300)), ("d", (500, 1))):
        photo(*size).save(folder / f"{name}.png")
    images = open_dataset(str(tmp_path / "set")).train
    kept, *shrunk = list(encoded_in_order(images, 0, Encoding(max_side=100, quality=95), 2))[:4]
    assert kept.content == (folder / "a.png").read_bytes()
    assert [file.ending for file in shrunk] == [".jpg"] * 3
    assert [opened(file.content).size for file in shrunk] == [(100, 59), (20, 100), (100, 1)]
    expected = photo(60, 300).resize((20, 100), Image.Resampling.LANCZOS)
    difference = np.asarray(opened(shrunk[1].content)).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 6  # of JPEG

    rougher = [len(Encoding(100, quality)(images, 2).content) for quality in (95, 40)]
    assert rougher[1] < rougher[0]


def test_what_cannot_be_decoded_is_kept(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set")
    cut = folder / "train" / "bee" / "2.png"
    cut.write_bytes(cut.read_bytes()[:-300])
    (folder / "train" / "cat" / "0.png").write_bytes(b"no image")
    images = open_dataset(str(folder), on_bad_image="skip").train
    files = list(encoded_in_order(images, 0, Encoding(max_side=10), 2))
    assert [i for i, file in enumerate(files) if file.undecodable] == [6]
    assert files[6].content == cut.read_bytes()
    assert files[8].content == b"no image"


def test_a_missing_file_ends_it(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    images = open_dataset(str(make_dataset(tmp_path / "set"))).train
    Path(images.name(3)).unlink()
    files = encoded_in_order(images, 0, Encoding(), 2)
    assert len([next(files) for _ in range(3)]) == 3
    with pytest.raises(UserError, match=r"ant/3.JPEG: cannot be read"):
        next(files)


@pytest.mark.parametrize("values", [{"max_side": 0}, {"quality": 0}, {"quality": 101}])
def test_impossible_numbers(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Encoding(**values)
