"""Where an image is cut out and whether it is mirrored: a pure function of (seed, epoch, image id, width, height).

The training window is that of torchvision's `RandomResizedCrop` (scale and aspect ratio augmentation, paper section
5.1): up to ten tries of a random area and aspect ratio, then a central window. Loaders only execute windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hvd_lb.plan.counter import uniform

_TRIES = 10
# What a random number is for; part of its key.
_AREA, _ASPECT, _X, _Y, _FLIP = range(5)


@dataclass(frozen=True)
class Windows:
    """Crop windows in whole pixels of the source images, inside them, and flips; arrays of shape (b,)."""

    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    height: np.ndarray
    flip: np.ndarray


Draw = Callable[[np.ndarray, np.ndarray, np.ndarray], Windows]
"""Windows of the images with these ids, widths and heights, all of shape (b,), in one pass over the data."""


@dataclass(frozen=True)
class Origin:
    """Where in a run a microbatch belongs: the `number`-th of step `step` of the run, in the pass `of`.

    In training that is the virtual worker; evaluations and recomputations come after their step.
    """

    of: Literal["train", "eval", "recompute_bn"]
    epoch: int
    step: int
    number: int

    def __str__(self) -> str:
        what = {"train": "", "eval": "evaluation after ", "recompute_bn": "recomputing batch norm after "}
        return f"{what[self.of]}epoch {self.epoch} step {self.step}"


@dataclass(frozen=True)
class Microbatch:
    """One virtual worker's images of one step: ids, int64 (b,), and their windows.

    `origin` says where it belongs; `draw` gives the windows of other images in the same place.
    """

    image_ids: np.ndarray
    windows: Windows
    origin: Origin | None = None
    draw: Draw | None = None

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class RandomWindows:
    """Training: a random window of `scale` times the image's area, of `ratio` aspect (width/height), mirrored
    with probability `flip`.
    """

    seed: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def windows(self, epoch: int, image_ids: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> Windows:
        """Windows of the images with these ids, widths and heights, all of shape (b,), in this epoch."""
        ids = np.asarray(image_ids, np.uint64)
        full_width = np.asarray(widths, np.float64)[:, None]
        full_height = np.asarray(heights, np.float64)[:, None]
        tries = np.arange(_TRIES, dtype=np.uint64)[None, :]

        def draw(purpose: int) -> np.ndarray:
            return uniform(self.seed, epoch, purpose, ids[:, None], tries)

        low, high = self.scale
        area = full_width * full_height * (low + (high - low) * draw(_AREA))
        log_low, log_high = np.log(self.ratio)
        aspect = np.exp(log_low + (log_high - log_low) * draw(_ASPECT))
        width, height = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        fits = (width >= 1) & (width <= full_width) & (height >= 1) & (height <= full_height)
        x = np.floor(draw(_X) * (full_width - width + 1))
        y = np.floor(draw(_Y) * (full_height - height + 1))

        chosen = np.arange(len(ids)), fits.argmax(axis=1)
        drawn = fits.any(axis=1)
        fallback = _central(full_width[:, 0], full_height[:, 0], self.ratio)
        own = [np.where(drawn, a[chosen], b) for a, b in zip((x, y, width, height), fallback, strict=True)]
        return _windows(own, uniform(self.seed, epoch, _FLIP, ids) < self.flip)


@dataclass(frozen=True)
class CentreWindows:
    """Evaluation: the central square whose side is `fraction` of the shorter side, never mirrored.

    224/256 cuts what resizing the shorter side to 256 and taking the central 224 × 224 shows (paper section 5.1).
    """

    fraction: float = 224 / 256

    def windows(self, widths: np.ndarray, heights: np.ndarray) -> Windows:
        """Windows of images of these widths and heights, both of shape (b,)."""
        full_width, full_height = np.asarray(widths, np.float64), np.asarray(heights, np.float64)
        side = np.maximum(1, np.round(np.minimum(full_width, full_height) * self.fraction))
        window = (np.round((full_width - side) / 2), np.round((full_height - side) / 2), side, side)
        return _windows(window, np.zeros(len(side), bool))


def _central(
    full_width: np.ndarray, full_height: np.ndarray, ratio: tuple[float, float]
) -> tuple[np.ndarray, ...]:
    """The largest central window whose aspect lies in `ratio`, as torchvision falls back to."""
    aspect = full_width / full_height
    width = np.where(aspect > ratio[1], np.round(full_height * ratio[1]), full_width)
    height = np.where(aspect < ratio[0], np.round(full_width / ratio[0]), full_height)
    width, height = np.clip(width, 1, full_width), np.clip(height, 1, full_height)
    return (full_width - width) // 2, (full_height - height) // 2, width, height


def _windows(parts: tuple[np.ndarray, ...] | list[np.ndarray], flip: np.ndarray) -> Windows:
    x, y, width, height = (part.astype(np.int32) for part in parts)
    return Windows(x, y, width, height, flip)
