"""RandAugment and TrivialAugment (Cubuk et al. 2020, arXiv 1909.13719; Müller and Hutter 2021, arXiv 2103.10158).

Fourteen operations, each of a strength from 0 to 30, in the spaces that torchvision gives the two; drawn by the
counter, and done by torchvision's functionals: on CPUs with PIL, as torchvision's reference does, on GPUs as tensors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvd_lb.plan.augment import AUTO_OPERATION, AUTO_SIGN, AUTO_STRENGTH, levels_of, normalised
from hvd_lb.plan.counter import uniform

if TYPE_CHECKING:
    from torch import Tensor

STRENGTHS = 31
_STRONGEST = STRENGTHS - 1
OPERATIONS = (
    *(
        "identity",
        "shear x",
        "shear y",
        "translate x",
        "translate y",
        "rotate",
        "brightness",
        "colour",
        "contrast",
    ),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)


@dataclass(frozen=True)
class Space:
    """What the strongest of each operation does: shears as a slope, `translate` in pixels of an image of 331 or, where
    it is not `relative`, in pixels; `rotate` in degrees; `enhance` is brightness, colour, contrast and sharpness around
    1; `bits` are taken away by posterize.
    """

    shear: float
    translate: float
    relative: bool
    rotate: float
    enhance: float
    bits: int


RANDOM = Space(shear=0.3, translate=150.0, relative=True, rotate=30.0, enhance=0.9, bits=4)
TRIVIAL_WIDE = Space(shear=0.99, translate=32.0, relative=False, rotate=135.0, enhance=0.99, bits=6)


@functools.cache
def _strengths(strongest: float) -> list[float]:
    """Of all strengths, as torchvision rounds them: 15 of 30 times 32 pixels are 15 pixels."""
    import torch

    return list(torch.linspace(0.0, strongest, STRENGTHS).tolist())


@dataclass(frozen=True)
class AutoAugment:
    """`operations` of them one after the other, each of this `strength`, or of any (None). Parameters: int16 (b,
    operations, 2), the operation and its strength with a sign.

    `mean` and `std` are those of the colours, 0 to 1.
    """

    space: Space
    operations: int
    strength: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def draw(self, seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(image_ids, np.uint64)[:, None]
        turns = np.arange(self.operations, dtype=np.uint64)[None, :]

        def drawn(purpose: int, count: int) -> np.ndarray:
            return (uniform(seed, epoch, purpose, ids, turns) * count).astype(np.int16)

        strength = drawn(AUTO_STRENGTH, STRENGTHS) if self.strength is None else np.int16(self.strength)
        sign = 1 - 2 * drawn(AUTO_SIGN, 2)
        return np.stack([drawn(AUTO_OPERATION, len(OPERATIONS)), sign * strength], axis=2)

    def apply(self, image: np.ndarray, parameters: Any) -> np.ndarray:
        from PIL import Image

        changed = Image.fromarray(np.ascontiguousarray(image))
        for operation, strength in parameters.tolist():
            changed = self._operate(changed, OPERATIONS[operation], strength, image.shape[1], image.shape[0])
        return np.asarray(changed)

    def apply_to_batch(self, x: Tensor, parameters: np.ndarray) -> Tensor:
        levels = levels_of(x, self.mean, self.std)
        for image, of in zip(levels, parameters.tolist(), strict=True):
            changed = image
            for operation, strength in of:
                changed = self._operate(changed, OPERATIONS[operation], strength, x.shape[3], x.shape[2])
            image.copy_(changed)
        return normalised(levels, self.mean, self.std, x)

    def _operate(self, image: Any, operation: str, signed: int, width: int, height: int) -> Any:
        """A PIL image or a tensor, uint8 (3, S, S), to the same; `signed` is the strength with its sign."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F  # noqa: N812 (its name everywhere)

        space, strong = self.space, abs(signed)
        bilinear = InterpolationMode.BILINEAR

        def moved(x: float = 0, y: float = 0, shear: tuple[float, float] = (0.0, 0.0)) -> Any:
            centre = [0, 0] if any(shear) else None
            slopes = [math.degrees(math.atan(slope)) for slope in shear]
            return F.affine(image, 0.0, [int(x), int(y)], 1.0, slopes, bilinear, center=centre)

        def of(strongest: float) -> float:
            return math.copysign(_strengths(strongest)[strong], signed)

        def distance(side: int) -> float:
            return of(space.translate / 331 * side if space.relative else space.translate)

        match operation:
            case "shear x":
                return moved(shear=(of(space.shear), 0.0))
            case "shear y":
                return moved(shear=(0.0, of(space.shear)))
            case "translate x":
                return moved(x=distance(width))
            case "translate y":
                return moved(y=distance(height))
            case "rotate":
                return F.rotate(image, of(space.rotate), bilinear)
            case "brightness":
                return F.adjust_brightness(image, 1 + of(space.enhance))
            case "colour":
                return F.adjust_saturation(image, 1 + of(space.enhance))
            case "contrast":
                return F.adjust_contrast(image, 1 + of(space.enhance))
            case "sharpness":
                return F.adjust_sharpness(image, 1 + of(space.enhance))
            case "posterize":
                return F.posterize(image, 8 - round(strong / (_STRONGEST / space.bits)))
            case "solarize":
                return F.solarize(image, 255 - _strengths(255.0)[strong])
            case "autocontrast":
                return F.autocontrast(image)
            case "equalize":
                return F.equalize(image)
        return image
