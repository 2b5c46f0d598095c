"""Tensors of windows: against torchvision's own transforms, and their memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.resize import Finisher
from hvd_lb.plan.augment import Drawn, Flip, Windows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = np.random.default_rng(0)
NOTHING = np.zeros(0, np.int32)
NOTHING_MORE = Windows(NOTHING, NOTHING, NOTHING, NOTHING)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(60, 90), (17, 5), (1, 1), (24, 24)])
def test_the_tensor_is_that_of_torchvisions_transforms(size: tuple[int, int], antialias: bool) -> None:
    picture = RNG.integers(0, 256, (100, 100, 3), dtype=np.uint8)
    window = picture[3 : 3 + size[0], 5 : 5 + size[1]]
    theirs = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize([24, 24], antialias=antialias),
            v2.RandomHorizontalFlip(1.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    with ThreadPoolExecutor(2) as pool:
        finish = Finisher(Preprocessing(24, MEAN, STD, antialias), 4, pool)
        mirrored = replace(NOTHING_MORE, augmentations=(Drawn(Flip(), np.array([True])),))
        (ours,) = finish([window], mirrored)
    torch.testing.assert_close(ours, theirs(window.copy()), rtol=1e-5, atol=1e-5)


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    def window(level: int) -> np.ndarray:
        return np.full((4, 4, 3), level, np.uint8)

    with ThreadPoolExecutor(1) as pool:
        finish = Finisher(Preprocessing(4, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), True), 2, pool)
        first = finish([window(1), window(2)], NOTHING_MORE)
        place, part = first.data_ptr(), first[1, 0]
        del first  # `part` shares its memory
        second = finish([window(3), window(4)], NOTHING_MORE)
        assert second.data_ptr() != place
        assert part.unique().tolist() == [2.0]
        del part
        third = finish([window(5)], NOTHING_MORE)
        assert third.data_ptr() == place
        assert third.shape == (1, 3, 4, 4)
        assert second.unique().tolist() == [3.0, 4.0]
