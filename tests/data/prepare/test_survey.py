"""Figures of a data set, also of one too large to be looked at as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_lb.data.images import ArrayImages
from hvd_lb.data.prepare.survey import Range, sample, survey


class ManyImages(ArrayImages):
    """A hundred million images of 1 to 1,000 pixels, of which a few are really read."""

    def __init__(self, count: int) -> None:
        self.classes = [str(label) for label in range(1001)]
        self.labels = np.broadcast_to(np.int64(7), count)
        self.widths = np.broadcast_to(np.arange(1, 1001, dtype=np.int32), (count // 1000, 1000)).reshape(-1)
        self.heights = np.broadcast_to(np.int32(20), count)
        self.asked = 0

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        self.asked += len(ids)
        return [np.zeros((2, 3, 3), np.uint8) for _ in ids]


@pytest.mark.slow
def test_large_data_sets_are_sampled() -> None:
    images = ManyImages(5_000_000)
    found = survey(images)
    assert images.asked == found.opened == 1000
    assert found.sized == 1_000_000
    assert found.images == 5_000_000
    assert found.per_class == Range(0, 0, 5_000_000)
    assert found.width.least == 1
    assert found.width.most == 1000
    assert found.width.median == pytest.approx(500, abs=5)
    assert sum(found.sides) == 1_000_000
    assert found.sides[0] / 1e6 == pytest.approx(0.032, abs=0.0005)
    assert found.mean_bytes == 18


@pytest.mark.parametrize(("images", "most"), [(0, 10), (10, 10), (11, 10), (10**9, 1000)])
def test_a_sample_is_of_different_images(images: int, most: int) -> None:
    chosen = sample(images, most)
    assert len(chosen) == min(images, most)
    assert len(np.unique(chosen)) == len(chosen)
    assert (np.diff(chosen) > 0).all()
    assert ((chosen >= 0) & (chosen < images)).all()
