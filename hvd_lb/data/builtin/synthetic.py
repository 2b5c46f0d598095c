"""Synthetic images: any number of labelled 224x224 pictures, made when read, for runs without data.

Image = the class's smooth random pattern + a piece of a fixed noise pool chosen by (split, id). All
arithmetic is on integers, so every machine makes the same pixels. A network can learn the classes; making an
image costs less than decoding a JPEG, so a data pipeline measured with it is not flattered by much.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from hvd_lb.data.images import Dataset
from hvd_lb.errors import UserError

IMAGENET_TRAIN, IMAGENET_VAL = 1_281_167, 50_000
CLASSES = 1_000
SIZE = 224

_CELLS = 7  # the pattern is linear between a grid of 8 x 8 knots, 32 pixels apart
_STEP = SIZE // _CELLS
_PATTERN_LEVELS, _NOISE_LEVELS = 192, 64  # their sum stays below 256
_POOL = 1 << 21
_PIXELS = SIZE * SIZE * 3


class SyntheticImages:
    """`count` images of `SIZE` x `SIZE` in `CLASSES` classes, a pure function of (split, id)."""

    encoded = False

    def __init__(self, count: int, split: Literal["train", "val"]) -> None:
        self._split = split
        self._split_key = {"train": 1, "val": 2}[split]
        self.classes = [f"class{label:03d}" for label in range(CLASSES)]
        self.labels = np.arange(count, dtype=np.int64) % CLASSES
        self.widths = np.broadcast_to(np.int32(SIZE), count)
        self.heights = np.broadcast_to(np.int32(SIZE), count)
        # Philox streams are specified bit for bit, unlike the draws of numpy's higher-level distributions.
        self._noise = _random_bytes(0, _POOL + _PIXELS) % np.uint8(_NOISE_LEVELS)
        knots = _random_bytes(1, CLASSES * (_CELLS + 1) ** 2 * 3) % np.uint8(_PATTERN_LEVELS)
        self._knots = knots.reshape(CLASSES, _CELLS + 1, _CELLS + 1, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        return [self._make(int(image_id)) for image_id in ids]

    def name(self, image_id: int) -> str:
        return f"synthetic {self._split} image {image_id}"

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        return b"", b""  # a function of their number

    def _make(self, image_id: int) -> np.ndarray:
        offset = _mix(image_id * 4 + self._split_key) % _POOL
        noise = self._noise[offset : offset + _PIXELS].reshape(SIZE, SIZE, 3)
        return _magnify(self._knots[self.labels[image_id]]) + noise


def open_synthetic(count: str | None) -> Dataset:
    """`synthetic:count`, or for None the size of ImageNet."""
    if count is None:
        train, val = IMAGENET_TRAIN, IMAGENET_VAL
    elif re.fullmatch("[0-9]{1,9}", count, re.ASCII) and int(count):
        train = int(count)
        val = min(IMAGENET_VAL, max(1, train // 25))
    else:
        raise UserError(
            f"synthetic:{count}: expected a positive number of images below 10⁹, as in synthetic:10000"
        )
    return Dataset("synthetic", SyntheticImages(train, "train"), SyntheticImages(val, "val"))


def _magnify(knots: np.ndarray) -> np.ndarray:
    """(8, 8, 3) uint8 to (SIZE, SIZE, 3) uint8 by linear interpolation, first along x, then along y."""
    weight = np.arange(_STEP, dtype=np.uint16)[None, :, None]

    def stretch(values: np.ndarray) -> np.ndarray:
        """(8, m) to (SIZE, m) along the first axis."""
        left, right = values[:-1, None, :], values[1:, None, :]
        return ((left * (_STEP - weight) + right * weight) // _STEP).reshape(SIZE, -1)

    wide = stretch(knots.transpose(1, 0, 2).reshape(_CELLS + 1, -1).astype(np.uint16))
    rows = wide.reshape(SIZE, _CELLS + 1, 3).transpose(1, 0, 2).reshape(_CELLS + 1, -1)
    return stretch(rows).astype(np.uint8).reshape(SIZE, SIZE, 3)


def _random_bytes(stream: int, count: int) -> np.ndarray:
    words = np.random.Philox(key=stream).random_raw(-(-count // 8))
    return words.astype("<u8").view(np.uint8)[:count]


def _mix(value: int) -> int:
    """SplitMix64's finaliser: neighbouring ids get far apart pieces of noise."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
