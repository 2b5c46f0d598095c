"""Windows: a function of (seed, epoch, image, size), inside the image, distributed as torchvision's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop

from hvd_lb.plan.augment import CentreWindows, Flip, RandomWindows, Windows
from hvd_lb.plan.counter import uniform


def flips(windows: Windows) -> np.ndarray:
    (drawn,) = windows.augmentations
    return drawn.parameters


@settings(max_examples=60)
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
        for field in ("x", "y", "width", "height"):
            assert getattr(one, field)[0] == getattr(whole, field)[i]
        assert flips(one)[0] == flips(whole)[i]


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
    assert abs(flips(ours).mean() - 0.5) < 0.04


@pytest.mark.parametrize(("width", "height"), [(12, 9), (9, 12)])
def test_every_place_is_as_likely_as_the_others(width: int, height: int) -> None:
    """From the first column and row to the last: windows of the same size in 40,000 images, by chi squared."""
    count = 40_000
    found = RandomWindows(5).windows(2, np.arange(count), np.full(count, width), np.full(count, height))
    for place, side, full in ((found.x, found.width, width), (found.y, found.height, height)):
        for chosen in (full - 1, full - 3, full - 5):
            places = place[side == chosen]
            counts = np.bincount(places, minlength=full - chosen + 1)
            expected = len(places) / (full - chosen + 1)
            assert expected > 300
            assert len(counts) == full - chosen + 1
            assert (
                (counts - expected) ** 2 / expected
            ).sum() < 25  # at most 5 degrees of freedom, p = 0.0001


def test_places_across_and_down_are_independent() -> None:
    """And of the size: else whole regions would never be seen together."""
    count = 40_000
    found = RandomWindows(5).windows(2, np.arange(count), np.full(count, 500), np.full(count, 375))
    spare_x, spare_y = 500 - found.width, 375 - found.height
    parts = [
        (found.x + 0.5) / (spare_x + 1), (found.y + 0.5) / (spare_y + 1), found.width * found.height,
        flips(found),
    ]  # fmt: skip
    correlations = np.corrcoef(np.array(parts, np.float64))
    off = np.abs(correlations[~np.eye(len(parts), dtype=bool)])
    assert off.max() < 5 / np.sqrt(count)


def test_the_aspect_is_width_over_height_and_even_in_its_logarithm() -> None:
    """Between 1 and 4 half of the windows are below 2, which is below 2.5 of a plain uniform distribution."""
    count = 20_000
    full = np.full(count, 1000)
    found = RandomWindows(0, (0.05, 0.06), (1.0, 4.0)).windows(0, np.arange(count), full, full)
    aspect = found.width / found.height
    assert 0.98 < aspect.min() < 1.02
    assert 3.9 < aspect.max() < 4.1
    assert abs((aspect < 2).mean() - 0.5) < 5 * 0.5 / np.sqrt(count) + 0.01  # whole pixels, too


def test_ten_tries_before_the_fallback() -> None:
    """Where one try in four fits, what falls back are 0.75 to the power of ten of the images."""
    count = 20_000
    found = RandomWindows(0, (0.5, 1.0), (0.5, 2.0)).windows(
        0, np.arange(count), np.full(count, 200), np.full(count, 100)
    )
    rng = np.random.default_rng(0)
    area = 200 * 100 * rng.uniform(0.5, 1, (count, 10))
    aspect = np.exp(rng.uniform(np.log(0.5), np.log(2), (count, 10)))
    fits = (np.round(np.sqrt(area * aspect)) <= 200) & (np.round(np.sqrt(area / aspect)) <= 100)
    expected = (~fits.any(axis=1)).mean()
    assert 0.01 < expected < 0.3
    fell_back = (found.width == 200) & (found.height == 100)  # of an aspect of 2 the whole image
    assert abs(fell_back.mean() - expected) < 6 * np.sqrt(expected / count)


def test_windows_as_wide_as_the_image_fit() -> None:
    """10 × 10 in an image of 10 × 100 is anywhere, not only in the middle where what does not fit goes."""
    count = 2000
    found = RandomWindows(0, (0.1, 0.1), (1.0, 1.0)).windows(
        0, np.arange(count), np.full(count, 10), np.full(count, 100)
    )
    assert {*found.width.tolist(), *found.height.tolist()} == {10}
    assert len(set(found.y.tolist())) == 91


def test_the_central_fallback_is_torchvisions() -> None:
    """Where no try fits, as in images of one row or column."""
    image_sizes = [(1000, 1), (1, 1000), (3000, 20), (20, 3000), (999, 2)]
    widths, heights = np.array(image_sizes).T
    ours = RandomWindows(0, (0.9, 1.0)).windows(0, np.arange(len(image_sizes)), widths, heights)
    for i, (width, height) in enumerate(image_sizes):
        top, left, h, w = RandomResizedCrop.get_params(
            torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3]
        )
        assert (ours.y[i], ours.x[i], ours.height[i], ours.width[i]) == (top, left, h, w)


def test_the_evaluation_crop_is_what_resize_256_and_centre_crop_224_show() -> None:
    windows = CentreWindows(224 / 256).windows(np.array([500, 256]), np.array([375, 300]))
    assert windows.width.tolist() == windows.height.tolist() == [328, 224]
    assert windows.x.tolist() == [86, 16]
    assert windows.y.tolist() == [24, 38]
    assert windows.augmentations == ()


@pytest.mark.parametrize("fraction", [0.3, 224 / 256, 0.9, 1.0])
def test_evaluation_crops_of_all_sizes_are_torchvisions(fraction: float) -> None:
    """Of a side rounded to the nearest whole number: halves of pixels, and sides that are odd."""
    for width, height in ((width, 70 - width) for width in range(5, 66)):
        found = CentreWindows(fraction).windows(np.array([width]), np.array([height]))
        side = round(fraction * min(width, height))
        place = torch.arange(width * height).view(1, height, width)
        expected = center_crop(place, [side, side])
        assert [int(of[0]) for of in (found.width, found.height)] == [side, side]
        assert expected[0, 0, 0] == int(found.y[0]) * width + int(found.x[0])


def test_every_epoch_and_seed_mirrors_others() -> None:
    """Two draws agree on about half of the images, and so do a flip and the place of its window."""
    ids = np.arange(4000)
    draws = [Flip().draw(seed, epoch, ids) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(ids))


def test_flips_never_or_always() -> None:
    ids = np.arange(64)
    assert not Flip(0.0).draw(0, 0, ids).any()
    assert Flip(1.0).draw(0, 0, ids).all()


def test_uniform_numbers() -> None:
    numbers = uniform(1, 2, np.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 85.4  # chi squared, 49 degrees of freedom, p = 0.001


class Brighten:
    """A second part: adds a level of its own to each image."""

    def draw(self, seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
        return (image_ids % 7 + epoch).astype(np.uint8)

    def apply(self, image: np.ndarray, parameters: np.uint8) -> np.ndarray:
        return image + parameters

    def apply_to_batch(self, x: torch.Tensor, parameters: np.ndarray) -> torch.Tensor:
        return x + torch.from_numpy(parameters)[:, None, None, None]


def test_parts_are_done_in_their_order_with_each_images_parameters() -> None:
    ids, side = np.arange(20), np.full(20, 8)
    windows = RandomWindows(0, augmentations=(Flip(), Brighten())).windows(3, ids, side, side)
    images = np.random.default_rng(0).integers(0, 200, (20, 8, 8, 3), dtype=np.uint8)
    flipped = Flip().draw(0, 3, ids)
    assert 0 < flipped.sum() < 20
    expected = (
        np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
        + (ids % 7 + 3)[:, None, None, None]
    )
    assert all((windows.augmented(images[i], i) == expected[i]).all() for i in range(20))
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float()
    assert (windows.augmented_batch(batch).numpy() == expected.transpose(0, 3, 1, 2)).all()


def test_windows_of_one_image_and_with_another_in_its_place() -> None:
    ids, side = np.arange(6), np.full(6, 40)
    random = RandomWindows(0, augmentations=(Flip(), Brighten()))
    windows, others = (random.windows(epoch, ids, side, side) for epoch in (0, 1))
    replaced = windows.replaced(4, others.single(2))
    for i in range(6):
        expected = others.single(2) if i == 4 else windows.single(i)
        found = replaced.single(i)
        for field in ("x", "y", "width", "height"):
            assert getattr(found, field) == getattr(expected, field)
        for a, b in zip(found.augmentations, expected.augmentations, strict=True):
            assert (a.part, a.parameters) == (b.part, b.parameters)
    assert (
        windows.x.tolist() == random.windows(0, ids, side, side).x.tolist()
    )  # it is another object that changed
