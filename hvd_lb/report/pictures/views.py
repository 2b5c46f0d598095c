"""What the network sees of some images: their windows, and the tensors that the run's own loader makes of these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from hvd_lb.data.decoding.decode import BadImage
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.plan.augment import Flip, Microbatch, Windows
from hvd_lb.recipe import Recipe
from hvd_lb.report.pictures.drawing import decoded

_MOST_BAD = 100


@dataclass(frozen=True)
class CropView:
    """A window (x, y, width, height) in pixels of the image, whether it is mirrored, and the tensor that comes of it:
    uint8 (S, S, 3), its normalisation undone.
    """

    window: tuple[int, int, int, int]
    flip: bool
    pixels: np.ndarray


@dataclass(frozen=True)
class View:
    """An image as stored, uint8 (height, width, 3), and what the network gets of it, epoch by epoch or once."""

    name: str
    label: str
    original: np.ndarray
    crops: list[CropView]


def views(
    recipe: Recipe, images: Images, ids: Iterator[int], count: int, epochs: int, device: torch.device
) -> list[View]:
    """Of the first `count` of `ids` that can be decoded: training windows of `epochs` epochs, or with 0 the one of
    evaluation.
    """
    originals = dict(islice(_whole(images, ids), count))
    chosen = np.array(list(originals), np.int64)
    if not len(chosen):
        return []
    widths, heights = images.widths[chosen], images.heights[chosen]
    if epochs:
        random = recipe.random_windows()
        windows = [random.windows(epoch, chosen, widths, heights) for epoch in range(epochs)]
    else:
        windows = [recipe.centre_windows().windows(widths, heights)]
    with open_loader(
        recipe.loader,
        images,
        [Microbatch(chosen, of) for of in windows],
        Preprocessing(
            recipe.image_size if epochs else recipe.evaluation_size, recipe.mean, recipe.std, recipe.antialias
        ),
        batch_size=len(chosen),
        device=device,
        threads=1,
        max_pixels=recipe.max_pixels,
    ) as loader:
        tensors = [_as_pixels(x, recipe) for x, _ in loader]
    return [
        View(
            images.name(image_id),
            images.classes[int(images.labels[image_id])],
            originals[image_id],
            [_crop(of, place, pixels) for of, pixels in zip(windows, tensors, strict=True)],
        )
        for place, image_id in enumerate(originals)
    ]


def _whole(images: Images, ids: Iterator[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Images that can be decoded. BadImage after too many that cannot."""
    bad = 0
    for image_id in ids:
        try:
            yield image_id, decoded(images, image_id)
        except BadImage:
            bad += 1
            if bad > _MOST_BAD:
                raise


def _as_pixels(x: torch.Tensor, recipe: Recipe) -> np.ndarray:
    """float32 (b, 3, S, S), normalised, to uint8 (b, S, S, 3)."""
    levels = x.cpu().permute(0, 2, 3, 1) * torch.tensor(recipe.std) + torch.tensor(recipe.mean)
    return (255 * levels).round().clamp(0, 255).to(torch.uint8).numpy()


def _crop(windows: Windows, place: int, pixels: np.ndarray) -> CropView:
    x, y, width, height = (int(of[place]) for of in (windows.x, windows.y, windows.width, windows.height))
    flips = [drawn.parameters[place] for drawn in windows.augmentations if isinstance(drawn.part, Flip)]
    return CropView((x, y, width, height), any(flips), pixels[place])
