"""Windows are cut out where the plan says, to the pixel: images whose levels are their own coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from loader_cases import KINDS, BlobImages, as_levels, load

from hvd_lb.data.images import ArrayImages, Images
from hvd_lb.plan.augment import CentreWindows, Drawn, Flip, Microbatch, RandomWindows, Windows

WIDTH, HEIGHT = 37, 23


def coordinates(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 (height, width, 3): column, row and their sum."""
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([column, row, column + row], axis=2).astype(np.uint8)


@pytest.fixture(params=["array", "PNG", "WEBP", "BMP"])
def images(request: pytest.FixtureRequest, encode) -> Images:  # type: ignore[no-untyped-def]
    """BMP is one that PIL decodes for DALI."""
    if request.param == "array":
        return ArrayImages(coordinates()[None], np.zeros(1), ["any"], "array")
    from PIL import Image

    more = {"lossless": True} if request.param == "WEBP" else {}
    return BlobImages([encode(Image.fromarray(coordinates()), request.param, **more)], [(WIDTH, HEIGHT)])


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_first_to_the_last_row_and_column(kind: str, images: Images) -> None:
    """All windows of 20 × 20, mirrored or not: each corner of the tensor tells from where it is."""
    side = 20
    places = [
        (x, y, flip) for x in range(WIDTH - side + 1) for y in range(HEIGHT - side + 1) for flip in (0, 1)
    ]
    x, y, flip = np.array(places, np.int32).T
    sides = np.full(len(places), side, np.int32)
    windows = Windows(x, y, sides, sides, (Drawn(Flip(), flip.astype(bool)),))
    (tensor,) = load(kind, images, [Microbatch(np.zeros(len(places), np.int64), windows)], as_levels(side))
    whole = coordinates().transpose(2, 0, 1)
    for i, (left, top, mirrored) in enumerate(places):
        expected = whole[:, top : top + side, left : left + side]
        expected = expected[:, :, ::-1] if mirrored else expected
        np.testing.assert_allclose(tensor[i].numpy(), expected, atol=1e-4)
    assert tensor[:, 0].max().round() == WIDTH - 1
    assert tensor[:, 1].max().round() == HEIGHT - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(3, 3), (WIDTH, HEIGHT), (WIDTH, 1), (1, HEIGHT), (1, 1)])
def test_a_window_of_any_size_shows_its_own_pixels_and_no_others(kind, size, images: Images) -> None:  # type: ignore[no-untyped-def]
    """Resized to one pixel without smoothing nothing is left of the rest, and its mean is that of the window."""
    width, height = size
    for x, y in ((0, 0), (WIDTH - width, HEIGHT - height)):
        window = Windows(*(np.array([value], np.int32) for value in (x, y, width, height)))
        (tensor,) = load(
            kind, images, [Microbatch(np.zeros(1, np.int64), window)], as_levels(8, antialias=True)
        )
        cut = coordinates()[y : y + height, x : x + width].astype(float)
        assert np.abs(tensor[0].numpy().mean((1, 2)) - cut.mean((0, 1))).max() < 1
        for channel in range(3):
            assert cut[..., channel].min() <= tensor[0, channel].min().round()
            assert tensor[0, channel].max().round() <= cut[..., channel].max()


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_training_and_evaluation_arrive_as_they_were_drawn(kind: str, images: Images) -> None:
    """The mean of each tensor is the middle of its window."""
    ids = np.zeros(1, np.int64)
    sizes = np.array([WIDTH]), np.array([HEIGHT])
    drawn = [RandomWindows(0).windows(epoch, ids, *sizes) for epoch in range(30)]
    drawn += [CentreWindows(fraction).windows(*sizes) for fraction in (0.3, 0.875, 1.0)]
    tensors = load(kind, images, [Microbatch(ids, windows) for windows in drawn], as_levels(16))
    for windows, tensor in zip(drawn, tensors, strict=True):
        middle = [
            (windows.x + (windows.width - 1) / 2)[0], (windows.y + (windows.height - 1) / 2)[0],
        ]  # fmt: skip
        np.testing.assert_allclose(tensor[0, :2].numpy().mean((1, 2)), middle, atol=0.3)
