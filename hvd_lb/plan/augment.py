"""Where an image is cut out and what is done to the crop: a pure function of (seed, epoch, image id, width, height).

What is done to the crop is a list of parts (`Augmentation`): `Flip`, `Erase`, and that of `auto_augment`. Parameters
are drawn here, and loaders only execute. The training window is that of torchvision's `RandomResizedCrop` (scale and
aspect ratio augmentation, paper section 5.1): up to ten tries of a random area and aspect ratio, then a central window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from hvd_lb.plan.counter import uniform

if TYPE_CHECKING:
    from torch import Tensor

_TRIES = 10
# What a random number is for; part of its key. A further part takes the next number, and none changes.
_AREA, _ASPECT, _X, _Y, _FLIP, AUTO_OPERATION, AUTO_STRENGTH, AUTO_SIGN, _ERASE = range(9)
_ERASE_AREA, _ERASE_ASPECT, _ERASE_X, _ERASE_Y = range(9, 13)


class Augmentation(Protocol):
    """One thing that is done to images between the crop and the network; pure, and without a state."""

    def draw(self, seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
        """Its parameters for the images with these ids, one row each: a function of the arguments alone."""

    def apply(self, image: np.ndarray, parameters: Any) -> np.ndarray:
        """A resized crop, uint8 (S, S, 3), with its row of the parameters, to the same form; may be a view."""

    def apply_to_batch(self, x: Tensor, parameters: np.ndarray) -> Tensor:
        """The same for normalised crops that were decoded on a GPU, float32 (b, 3, S, S); may change `x`."""


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right with a probability (paper section 5.1); its parameters are bool (b,)."""

    probability: float = 0.5

    def draw(self, seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
        return uniform(seed, epoch, _FLIP, np.asarray(image_ids, np.uint64)) < self.probability

    def apply(self, image: np.ndarray, parameters: Any) -> np.ndarray:
        return image[:, ::-1] if parameters else image

    def apply_to_batch(self, x: Tensor, parameters: np.ndarray) -> Tensor:
        flipped = np.flatnonzero(parameters)
        x[flipped] = x[flipped].flip(3)
        return x


@dataclass(frozen=True)
class Erase:
    """Random erasing (Zhong et al. 2017, arXiv 1708.04896), as torchvision's `RandomErasing`: with a probability, a
    rectangle of 0.02 to 0.33 of the crop's area and an aspect of 0.3 to 3.3 becomes the mean colour. Parameters: x, y,
    width and height in pixels of the crop, int32 (b, 4); width 0 is none.

    `size` is the side of the crops, `mean` the mean of the colours, 0 to 1. On CPUs it is rounded to 8 bits.
    """

    probability: float
    size: int
    mean: tuple[float, float, float]
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def draw(self, seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(image_ids, np.uint64)
        tries = np.arange(_TRIES, dtype=np.uint64)[None, :]

        def draw(purpose: int) -> np.ndarray:
            return uniform(seed, epoch, purpose, ids[:, None], tries)

        area = self.size**2 * (self.scale[0] + (self.scale[1] - self.scale[0]) * draw(_ERASE_AREA))
        low, high = np.log(self.ratio)
        aspect = np.exp(low + (high - low) * draw(_ERASE_ASPECT))
        height, width = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        fits = (width < self.size) & (height < self.size) & (width >= 1) & (height >= 1)
        x = np.floor(draw(_ERASE_X) * (self.size - width + 1))
        y = np.floor(draw(_ERASE_Y) * (self.size - height + 1))
        boxes = np.stack([x, y, width, height], axis=2)[np.arange(len(ids)), fits.argmax(axis=1)]
        erased = (uniform(seed, epoch, _ERASE, ids) < self.probability) & fits.any(axis=1)
        return np.where(erased[:, None], boxes, 0).astype(np.int32)

    def apply(self, image: np.ndarray, parameters: Any) -> np.ndarray:
        x, y, width, height = parameters.tolist()
        if not width:
            return image
        image = image.copy()
        image[y : y + height, x : x + width] = np.round(255 * np.array(self.mean))
        return image

    def apply_to_batch(self, x: Tensor, parameters: np.ndarray) -> Tensor:
        for image, (left, top, width, height) in zip(x, parameters.tolist(), strict=True):
            image[:, top : top + height, left : left + width] = 0
        return x


def levels_of(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images, float32 (b, 3, S, S), as 8 bits."""
    shift, scale = _colours(mean, x), _colours(std, x)
    return (x * scale + shift).round().clamp(0, 255).byte()


def normalised(levels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], into: Tensor) -> Tensor:
    """The reverse of `levels_of`, written to `into`."""
    return into.copy_(levels).sub_(_colours(mean, into)).div_(_colours(std, into))


def _colours(of: tuple[float, ...], like: Tensor) -> Tensor:
    return 255 * like.new_tensor(of).view(3, 1, 1)


@dataclass(frozen=True)
class Drawn:
    """A part and its parameters for the images of a microbatch, one row each."""

    part: Augmentation
    parameters: np.ndarray


@dataclass(frozen=True)
class Windows:
    """Crop windows in whole pixels of the source images, inside them, arrays of shape (b,); and what is done to the
    crops, in this order.
    """

    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    height: np.ndarray
    augmentations: tuple[Drawn, ...] = ()

    def augmented(self, image: np.ndarray, position: int) -> np.ndarray:
        """What is done to the resized crop of the image at `position`, uint8 (S, S, 3)."""
        for drawn in self.augmentations:
            image = drawn.part.apply(image, drawn.parameters[position])
        return image

    def augmented_batch(self, x: Tensor) -> Tensor:
        """The same for all crops at once: see `Augmentation.apply_to_batch`."""
        for drawn in self.augmentations:
            x = drawn.part.apply_to_batch(x, drawn.parameters)
        return x

    def single(self, position: int) -> Windows:
        """Those of the one image at `position`."""
        return self._mapped(lambda rows: rows[position : position + 1])

    def replaced(self, position: int, other: Windows) -> Windows:
        """With those of `other`, which are of one image, at `position`."""
        rest = iter(other._arrays())

        def replace(rows: np.ndarray) -> np.ndarray:
            rows = rows.copy()
            rows[position] = next(rest)[0]
            return rows

        return self._mapped(replace)

    def _arrays(self) -> list[np.ndarray]:
        return [self.x, self.y, self.width, self.height, *(drawn.parameters for drawn in self.augmentations)]

    def _mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> Windows:
        x, y, width, height, *parameters = map(change, self._arrays())
        parts = (drawn.part for drawn in self.augmentations)
        return Windows(x, y, width, height, tuple(map(Drawn, parts, parameters)))


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
    """Training: a random window of `scale` times the image's area, of `ratio` aspect (width/height), and then
    `augmentations`.
    """

    seed: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augmentations: tuple[Augmentation, ...] = (Flip(),)

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
        fitting = fits.any(axis=1)
        fallback = _central(full_width[:, 0], full_height[:, 0], self.ratio)
        own = [np.where(fitting, a[chosen], b) for a, b in zip((x, y, width, height), fallback, strict=True)]
        drawn = (Drawn(part, part.draw(self.seed, epoch, image_ids)) for part in self.augmentations)
        return _windows(own, *drawn)


@dataclass(frozen=True)
class CentreWindows:
    """Evaluation: the central square whose side is `fraction` of the shorter side, and nothing else.

    224/256 cuts what resizing the shorter side to 256 and taking the central 224 × 224 shows (paper section 5.1).
    """

    fraction: float = 224 / 256

    def windows(self, widths: np.ndarray, heights: np.ndarray) -> Windows:
        """Windows of images of these widths and heights, both of shape (b,)."""
        full_width, full_height = np.asarray(widths, np.float64), np.asarray(heights, np.float64)
        side = np.maximum(1, np.round(np.minimum(full_width, full_height) * self.fraction))
        window = (np.round((full_width - side) / 2), np.round((full_height - side) / 2), side, side)
        return _windows(window)


def _central(
    full_width: np.ndarray, full_height: np.ndarray, ratio: tuple[float, float]
) -> tuple[np.ndarray, ...]:
    """The largest central window whose aspect lies in `ratio`, as torchvision falls back to."""
    aspect = full_width / full_height
    width = np.where(aspect > ratio[1], np.round(full_height * ratio[1]), full_width)
    height = np.where(aspect < ratio[0], np.round(full_width / ratio[0]), full_height)
    width, height = np.clip(width, 1, full_width), np.clip(height, 1, full_height)
    return (full_width - width) // 2, (full_height - height) // 2, width, height


def _windows(parts: tuple[np.ndarray, ...] | list[np.ndarray], *drawn: Drawn) -> Windows:
    x, y, width, height = (part.astype(np.int32) for part in parts)
    return Windows(x, y, width, height, drawn)
