"""RandAugment, TrivialAugment and random erasing: torchvision's operations, with parameters from the counter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomErasing
from torchvision.transforms.autoaugment import RandAugment, TrivialAugmentWide, _apply_op

from hvd_lb.plan.augment import Erase, RandomWindows
from hvd_lb.plan.auto_augment import OPERATIONS, RANDOM, TRIVIAL_WIDE, AutoAugment
from hvd_lb.recipe import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISIONS = {
    "identity": "Identity", "shear x": "ShearX", "shear y": "ShearY", "translate x": "TranslateX",
    "translate y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "colour": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize", "solarize": "Solarize",
    "autocontrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip


def picture(size: int) -> np.ndarray:
    """Colours that change smoothly, and a few edges."""
    y, x = np.mgrid[:size, :size]
    levels = np.stack([60 + 120 * x / size, 200 - 150 * y / size, 90 + 40 * np.sin(x / 3 + y / 5)], axis=2)
    levels[size // 3 : size // 2, size // 4 : size // 2] += 40
    return levels.astype(np.uint8)


def augment(kind: str) -> tuple[AutoAugment, dict[str, Any]]:
    """Ours, and torchvision's strengths by its names for an image of 48 × 40 pixels."""
    if kind == "random":
        return AutoAugment(RANDOM, 2, 9, MEAN, STD), RandAugment()._augmentation_space(31, (40, 48))
    return AutoAugment(TRIVIAL_WIDE, 1, None, MEAN, STD), TrivialAugmentWide()._augmentation_space(31)


@pytest.mark.parametrize("kind", ["random", "trivial"])
def test_every_operation_of_every_strength_is_torchvisions(kind: str) -> None:
    ours, space = augment(kind)
    image = picture(48)[:40]
    for number, name in enumerate(OPERATIONS):
        strengths, signed = space[TORCHVISIONS[name]]
        for place in range(31):
            for sign in (1, -1) if signed else (1,):
                strength = float(strengths[place]) if strengths.ndim else 0.0
                expected = _apply_op(
                    Image.fromarray(image),
                    TORCHVISIONS[name],
                    sign * strength,
                    InterpolationMode.BILINEAR,
                    None,
                )
                found = ours.apply(image, np.array([[number, sign * place]], np.int16))
                assert np.array_equal(found, np.asarray(expected)), (name, sign * place)


def test_a_batch_on_a_device_is_the_images_one_by_one() -> None:
    """To the rounding in which tensors and PIL differ: at most a level, where nothing is moved."""
    ours, _ = augment("trivial")
    still = [
        number for number, name in enumerate(OPERATIONS) if not name.startswith(("shear", "transl", "rot"))
    ]
    parameters = np.array([[[number, strength]] for number in still for strength in (4, 17, 30)], np.int16)
    images = np.stack([picture(32)] * len(parameters))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    x = (((torch.from_numpy(images) / 255) - mean) / std).permute(0, 3, 1, 2).contiguous()
    found = ours.apply_to_batch(x, parameters).permute(0, 2, 3, 1) * std + mean
    expected = np.stack([ours.apply(image, of) for image, of in zip(images, parameters, strict=True)])
    assert (found * 255 - torch.from_numpy(expected)).abs().max() < 1.01


def test_operations_and_strengths_are_equally_likely_and_signs_too() -> None:
    count = 42_000
    drawn = AutoAugment(TRIVIAL_WIDE, 1, None, MEAN, STD).draw(3, 1, np.arange(count))
    operations, strengths = drawn[:, 0, 0], drawn[:, 0, 1]
    for values, kinds in ((operations, 14), (np.abs(strengths), 31)):
        counts = np.bincount(values, minlength=kinds)
        assert len(counts) == kinds
        assert (np.abs(counts - count / kinds) < 6 * math.sqrt(count / kinds)).all()
    assert abs((strengths[strengths != 0] > 0).mean() - 0.5) < 0.02
    assert abs(np.corrcoef(operations, strengths)[0, 1]) < 0.03
    signs = np.sign(strengths[strengths != 0])  # one of a weak operation and of a strong one
    for values in (operations, np.abs(strengths)):
        assert abs(np.corrcoef(signs, values[strengths != 0])[0, 1]) < 0.03
    two = AutoAugment(RANDOM, 2, 9, MEAN, STD).draw(3, 1, np.arange(count))
    assert set(np.abs(two[:, :, 1]).ravel().tolist()) == {9}
    assert abs(np.corrcoef(two[:, 0, 0], two[:, 1, 0])[0, 1]) < 0.03


def test_what_an_image_gets_depends_on_it_alone_and_on_the_epoch() -> None:
    parts = Recipe(auto_augment="trivialaugment", random_erasing=0.5).random_windows().augmentations
    for part in parts[1:]:
        whole, one = part.draw(1, 2, np.arange(50)), part.draw(1, 2, np.array([17]))
        assert np.array_equal(one[0], whole[17])
        assert not np.array_equal(part.draw(1, 3, np.arange(50)), whole)
        assert not np.array_equal(part.draw(2, 2, np.arange(50)), whole)


def test_the_windows_of_a_recipe_without_them_are_as_before() -> None:
    """Every part has random numbers of its own."""
    ids, side = np.arange(30), np.full(30, 64)
    plain = Recipe().random_windows().windows(2, ids, side, side)
    rich = Recipe(auto_augment="randaugment", random_erasing=1.0).random_windows().windows(2, ids, side, side)
    assert np.array_equal(plain.x, rich.x)
    assert np.array_equal(plain.augmentations[0].parameters, rich.augmentations[0].parameters)
    assert len(rich.augmentations) == 3


def test_erased_rectangles_are_torchvisions() -> None:
    count, size = 4000, 96
    ours = Erase(1.0, size, MEAN).draw(0, 0, np.arange(count))
    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    theirs = np.array(
        [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(count)]
    )
    for mine, other in zip((ours[:, 1], ours[:, 0], ours[:, 3], ours[:, 2]), theirs.T, strict=True):
        assert abs(mine.mean() - other.mean()) < 6 * other.std() / math.sqrt(count)
        assert mine.std() == pytest.approx(other.std(), rel=0.1)
    assert ((ours[:, :2] + ours[:, 2:]) <= size).all()
    assert (ours >= 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_an_erased_rectangle_is_anywhere_up_to_the_last_row_and_column(size: int) -> None:
    """Of one that is smaller than the crop, as in torchvision: where none is, none is drawn."""
    drawn = Erase(1.0, size, MEAN).draw(0, 0, np.arange(3000))
    none = drawn[:, 2] == 0
    assert not drawn[none].any()
    assert none.all() == (size == 1)
    for place, side in (drawn[~none][:, [0, 2]].T, drawn[~none][:, [1, 3]].T):
        assert ((side >= 1) & (side < size)).all()
        for chosen in np.unique(side[:2000]):
            here = place[side == chosen]
            if len(here) > 200:
                assert set(here.tolist()) == set(range(size - int(chosen) + 1))


def test_what_is_erased_is_the_mean_colour_and_the_rest_stays() -> None:
    erase, image = Erase(0.3, 32, MEAN), picture(32)
    drawn = erase.draw(7, 0, np.arange(2000))
    assert abs((drawn[:, 2] > 0).mean() - 0.3) < 0.05
    x, y, width, height = next(of for of in drawn if of[2]).tolist()
    found = erase.apply(image, np.array([x, y, width, height], np.int32))
    expected = image.copy()
    expected[y : y + height, x : x + width] = [124, 116, 104]
    assert np.array_equal(found, expected)
    assert np.array_equal(image, picture(32)), "the crop itself is not written to"
    on_device = erase.apply_to_batch(
        torch.ones(2, 3, 32, 32), np.array([[x, y, width, height], [0, 0, 0, 0]])
    )
    assert width != height
    assert (on_device[0, :, y : y + height, x : x + width] == 0).all()
    assert int((on_device == 0).sum()) == 3 * width * height
    assert (on_device[1] == 1).all()


def test_loaders_make_the_same_tensors_of_it(tmp_path: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from hvd_lb.data.loading.contract import Preprocessing
    from hvd_lb.data.loading.resize import Finisher

    recipe = Recipe(auto_augment="trivialaugment", random_erasing=0.5, image_size=24)
    crops = [picture(size) for size in (24, 40, 33)]
    sides = np.array([24, 40, 33])
    windows = RandomWindows(0, (1.0, 1.0), (1.0, 1.0), recipe.random_windows().augmentations).windows(
        0, np.arange(3), sides, sides
    )
    preprocessing = Preprocessing(24, MEAN, STD, True)
    with ThreadPoolExecutor(2) as pool:
        rows = [Finisher(preprocessing, 3, pool)(crops, windows).clone() for _ in range(2)]
    assert torch.equal(rows[0], rows[1])
    one = windows.single(1)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(Finisher(preprocessing, 1, pool)([crops[1]], one)[0], rows[0][1])
