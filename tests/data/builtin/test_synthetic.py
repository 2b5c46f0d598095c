"""Synthetic images: pure, labelled, learnable, of any number."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_lb.data.dataset import open_dataset
from hvd_lb.errors import UserError


def test_the_default_has_the_size_of_imagenet() -> None:
    data = open_dataset("synthetic")
    assert (len(data.train), len(data.val), len(data.train.classes)) == (1_281_167, 50_000, 1_000)
    assert data.train.widths.shape == (1_281_167,)
    assert data.train.widths.strides == (0,)
    image = data.train.read(np.array([1_281_166]))[0]
    assert (image.shape, image.dtype) == ((224, 224, 3), np.uint8)


def test_an_image_is_a_function_of_its_id_and_split() -> None:
    small, large = open_dataset("synthetic:3000"), open_dataset("synthetic:100000")
    ids = np.array([5, 2999, 5])
    first, again = small.train.read(ids), large.train.read(ids[::-1])
    for a, b in zip(first, again[::-1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[0] != small.val.read(np.array([5]))[0]).any()
    assert int(first[0].sum()) == 17_277_740  # the same on every machine


def test_images_of_a_class_are_alike_and_others_are_not() -> None:
    data = open_dataset("synthetic:100000")
    assert (data.train.labels[:3000] == np.arange(3000) % 1000).all()
    a, b, other = (image.astype(float) for image in data.train.read(np.array([7, 1007, 8])))
    assert 0 < np.abs(a - b).mean() < 30 < np.abs(a - other).mean()


@pytest.mark.parametrize(("count", "held_out"), [(1, 1), (24, 1), (100, 4), (5_000_000, 50_000)])
def test_the_validation_set_is_a_25th_up_to_imagenets(count: int, held_out: int) -> None:
    assert len(open_dataset(f"synthetic:{count}").val) == held_out


@pytest.mark.parametrize(
    "spec", ["synthetic:0", "synthetic:-5", "synthetic:many", "synthetic:1e6", "synthetic:²", "synthetic:"]
)
def test_a_bad_number_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="expected a positive number of images"):
        open_dataset(spec)
