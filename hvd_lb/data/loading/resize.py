"""From windows of decoded images to the tensors of a microbatch, on CPUs: resized, augmented, normalised.

Both loaders end with this on CPUs, so their tensors are the same to the bit. DALI's own resize takes six times as long
there, because most of it is not vectorised (docs/data.md, Speed).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F  # noqa: N812 (its name everywhere)

from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.plan.augment import Windows

# Values in a task of the pool: with less to do, threads would only wait for each other's Python.
_WORTH_A_TASK = 1 << 18


def resize(window: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 (height, width, 3) to (S, S, 3), in torchvision's arithmetic for 8 bits."""
    channels_first = torch.from_numpy(np.require(window, requirements=["C", "W"])).permute(2, 0, 1)
    size = [preprocessing.image_size, preprocessing.image_size]
    return F.resize(channels_first, size, antialias=preprocessing.antialias).permute(1, 2, 0).numpy()


class Finisher:
    """Makes tensors of windows, (level - 255 mean) * (1 / (255 std)) in float32, with the threads of `pool`.

    A tensor's memory is used again when nothing refers to it any more: fresh pages for each microbatch would cost as
    much as resizing.
    """

    def __init__(self, preprocessing: Preprocessing, batch_size: int, pool: Executor) -> None:
        self._preprocessing, self._pool = preprocessing, pool
        self._shape = (batch_size, 3, preprocessing.image_size, preprocessing.image_size)
        self._unused: list[np.ndarray] = []
        self._mean, std = (
            np.array([255 * value for value in of], np.float32).reshape(3, 1, 1)
            for of in (preprocessing.mean, preprocessing.std)
        )
        self._scale = np.float32(1) / std

    def __call__(self, crops: Sequence[np.ndarray], windows: Windows) -> torch.Tensor:
        """uint8 arrays (height, width, 3), cut out by `windows`, to float32 (b, 3, S, S)."""
        rows = self._rows(len(crops))
        largest = max(rows[0].size, *(crop.size for crop in crops))
        together = max(1, _WORTH_A_TASK // largest)

        def fill(start: int) -> None:
            part = slice(start, start + together)
            for position, crop in enumerate(crops[part], start):
                resized = resize(crop, self._preprocessing)
                rows[position] = windows.augmented(resized, position).transpose(2, 0, 1)
            # In numpy: elementwise operations of torch would start threads of their own in each of ours.
            rows[part] -= self._mean
            rows[part] *= self._scale

        list(self._pool.map(fill, range(0, len(crops), together)))
        return torch.from_numpy(rows)

    def _rows(self, count: int) -> np.ndarray:
        """float32 (count, 3, S, S): a new object, which lives as long as any tensor that shares its memory."""
        memory = self._unused.pop() if self._unused else np.empty(self._shape, np.float32)
        rows = memory[:count]
        weakref.finalize(rows, self._unused.append, memory).atexit = False
        return rows
