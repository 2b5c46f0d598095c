"""Pictures for people: contact sheet and preview show what the loaders make, wherever it lies, whatever its shape."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import ArrayImages
from hvd_lb.recipe import Recipe
from hvd_lb.report.pictures.contact_sheet import contact_sheet
from hvd_lb.report.pictures.drawing import font, magnified, shortened
from hvd_lb.report.pictures.preview import COLOURS, preview
from hvd_lb.report.pictures.views import View, views

CPU = torch.device("cpu")
LOADERS = ("dali", "torchvision")


@pytest.fixture
def noise() -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    return ArrayImages(pixels, np.arange(6) % 3, ["ant", "bee", "käfer 甲虫"], "noise")


def recipe(**values: Any) -> Recipe:
    return Recipe(data="digits", image_size=8, **values)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_seen_is_what_the_loader_makes(loader: str, noise: ArrayImages) -> None:
    whole = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "loader": loader}
    found = views(recipe(flip=1, **whole), noise, iter([4, 1, 3]), 2, 3, CPU)
    assert [view.name for view in found] == ["noise[4]", "noise[1]"]
    assert [view.label for view in found] == ["bee", "bee"]
    for view in found:
        assert len(view.crops) == 3
        for crop in view.crops:
            assert crop.flip
            assert crop.window == (0, 0, 8, 8)
            assert (crop.pixels == view.original[:, ::-1]).all()

    (view,) = views(recipe(eval_crop=1, loader=loader), noise, iter([2]), 1, 0, CPU)
    assert not view.crops[0].flip
    assert (view.crops[0].pixels == view.original).all()


def test_windows_are_those_of_the_run(noise: ArrayImages) -> None:
    from hvd_lb.plan.augment import RandomWindows

    (view,) = views(recipe(seed=3), noise, iter([5]), 1, 4, CPU)
    for epoch, crop in enumerate(view.crops):
        windows = RandomWindows(3).windows(epoch, np.array([5]), np.array([8]), np.array([8]))
        assert crop.window == tuple(
            int(of[0]) for of in (windows.x, windows.y, windows.width, windows.height)
        )
        assert crop.flip == windows.augmentations[0].parameters[0]


def drawn(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == colour).all(axis=2).sum())


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (500, 375), (3000, 60), (30, 2000), (1, 1)])
def test_each_window_can_be_seen_also_where_they_coincide(size: tuple[int, int]) -> None:
    original = np.full((size[1], size[0], 3), 90, np.uint8)
    images = ArrayImages(
        original[None], np.zeros(1, np.int64), ["a class with a very long name indeed"], "one"
    )
    chosen = recipe(crop_scale=(1, 1), crop_ratio=(1, 1))
    rows = views(chosen, images, iter([0]), 1, 4, CPU)
    without = preview([View("", "", original, [])], [], "", "")
    picture = preview(rows, views(chosen, images, iter([0]), 1, 0, CPU), "title", "subtitle")
    for colour in COLOURS[:4]:
        frame = 2 * 4 * (224 + 232)  # of the tensor
        assert drawn(picture, colour) > frame + 30
        assert drawn(without, colour) == 0


def test_a_contact_sheet_shows_what_cannot_be_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        Image.new("RGB", (30, 20), (250, 0, 0)).save(tmp_path / split / "ant" / "1.png")
        (tmp_path / split / "bee").mkdir()
        (tmp_path / split / "bee" / "2.png").write_bytes(b"no image")
    images = open_dataset(str(tmp_path), on_bad_image="skip").train
    sheet = contact_sheet(images, "title")
    assert drawn(sheet, (250, 0, 0)) == 120 * 80
    assert sheet.size == (2 * 140 + 12, 40 + 158)


def test_a_contact_sheet_is_a_function_of_the_seed(noise: ArrayImages) -> None:
    sheets = [contact_sheet(noise, "t", columns=2, rows=2, seed=seed).tobytes() for seed in (0, 0, 1)]
    assert sheets[0] == sheets[1] != sheets[2]


def test_small_images_grow_in_whole_steps_and_long_ones_are_squeezed() -> None:
    def size(width: int, height: int, steepest: float | None = None) -> tuple[int, int]:
        return magnified(np.zeros((height, width, 3), np.uint8), (300, 200), steepest).size

    assert size(28, 28) == (196, 196)
    assert size(500, 375) == (267, 200)
    assert size(3000, 1) == (300, 1)
    assert size(3000, 1, 3) == (300, 100)
    assert size(1, 3000, 3) == (67, 200)


def test_names_fit_their_place() -> None:
    for text in ("ant", "a class with a very long name indeed", "new\nline", "𝄞" * 50):
        short = shortened(text, font(12), 100)
        assert font(12).getlength(short) <= 100
        assert short.isprintable()
