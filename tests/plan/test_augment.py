"""Windows: a function of (seed, epoch, image, size), inside the image, distributed as torchvision's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from hvd_lb.plan.augment import CentreWindows, RandomWindows
from hvd_lb.plan.counter import uniform


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=20),
    st.integers(0, 99),
)
def test_windows_lie_inside(sizes: list[tuple[int, int]], seed: int) -> None:
    widths, heights = np.array(sizes, np.int32).T
    ids = np.arange(len(sizes))
    for windows in (
        RandomWindows(seed).windows(4, ids, widths, heights),
        CentreWindows().windows(widths, heights),
    ):
        assert (windows.width >= 1).all()
        assert (windows.height >= 1).all()
        assert (windows.x >= 0).all()
        assert (windows.y >= 0).all()
        assert (windows.x + windows.width <= widths).all()
        assert (windows.y + windows.height <= heights).all()


def test_an_images_window_does_not_depend_on_its_batch() -> None:
    random = RandomWindows(1)
    ids, widths, heights = np.arange(100), np.full(100, 500), np.full(100, 375)
    whole = random.windows(3, ids, widths, heights)
    for i in (0, 17, 99):
        one = random.windows(3, ids[i : i + 1], widths[:1], heights[:1])
        for field in ("x", "y", "width", "height", "flip"):
            assert getattr(one, field)[0] == getattr(whole, field)[i]


def test_epochs_and_seeds_differ() -> None:
    ids, widths, heights = np.arange(50), np.full(50, 500), np.full(50, 375)
    draws = [
        RandomWindows(seed).windows(epoch, ids, widths, heights).x for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (64, 64), (300, 40)])
def test_distribution_is_torchvisions(width: int, height: int) -> None:
    """Means and spreads of 4,000 windows each; (300, 40) mostly falls back to the centre."""
    count = 4000
    ours = RandomWindows(0).windows(0, np.arange(count), np.full(count, width), np.full(count, height))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    for mine, other in zip((ours.y, ours.x, ours.height, ours.width), theirs.T, strict=True):
        spread = other.std() / np.sqrt(count)
        assert abs(mine.mean() - other.mean()) < 6 * spread + 1e-9
        assert mine.std() == pytest.approx(other.std(), rel=0.1, abs=1e-9)
    assert abs(ours.flip.mean() - 0.5) < 0.04


def test_the_evaluation_crop_is_what_resize_256_and_centre_crop_224_show() -> None:
    windows = CentreWindows(224 / 256).windows(np.array([500, 256]), np.array([375, 300]))
    assert windows.width.tolist() == windows.height.tolist() == [328, 224]
    assert windows.x.tolist() == [86, 16]
    assert windows.y.tolist() == [24, 38]
    assert not windows.flip.any()


def test_flips_never_or_always() -> None:
    ids, side = np.arange(64), np.full(64, 32)
    assert not RandomWindows(0, flip=0.0).windows(0, ids, side, side).flip.any()
    assert RandomWindows(0, flip=1.0).windows(0, ids, side, side).flip.all()


def test_uniform_numbers() -> None:
    numbers = uniform(1, 2, np.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 85.4  # chi squared, 49 degrees of freedom, p = 0.001
