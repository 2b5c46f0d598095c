"""Makes pictures of several Fashion-MNIST garments, with boxes and masks as COCO has them.

    python examples/detection/garments.py garments

writes garments/train, garments/val (PNG) and garments/train.json, garments/val.json. A picture is a function of the
seed, its split and its number. Garments of the validation pictures are those of Fashion-MNIST's validation images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hvd_lb.data.builtin.named import open_fashion_mnist
from hvd_lb.data.images import Dataset, Images

SIDE = 64
SPLITS = ("train", "val")
CATEGORIES = ("top", "trousers", "dress", "shoe", "bag")
# Of Fashion-MNIST's ten kinds: T-shirts, pullovers, coats and shirts are hard to tell apart even by people.
_CATEGORY_OF = (1, 2, 1, 3, 1, 4, 1, 4, 5, 4)
# A garment's own pixels: Fashion-MNIST's background is 0, and resizing smears edges.
_FOREGROUND = 24
# What is seen of a garment, in pixels and as a share of it; with less it is not told of, as nobody could name it.
_LEAST_SEEN, _LEAST_SHARE = 40, 0.25
_CROWDED_PICTURES = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=320, help="training pictures [320]")
    parser.add_argument("--val", type=int, default=200, help="validation pictures [200]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make(options.folder, open_fashion_mnist(), {"train": options.train, "val": options.val}, options.seed)


def make(folder: Path, garments: Dataset, pictures: dict[str, int], seed: int) -> None:
    """So many `pictures` of each split, of small grey images on black."""
    for split, images in (("train", garments.train), ("val", garments.val)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        told: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [
                {"id": category, "name": name, "supercategory": "garment"}
                for category, name in enumerate(CATEGORIES, 1)
            ],
        }
        for number in range(pictures[split]):
            name = f"{split}/{number:06d}.png"
            canvas, objects = compose(images, (seed, SPLITS.index(split), number))
            Image.fromarray(canvas).convert("RGB").save(folder / name)
            told["images"].append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
            for found in objects:
                told["annotations"].append({"id": len(told["annotations"]) + 1, "image_id": number, **found})
        (folder / f"{split}.json").write_text(json.dumps(told))


def compose(garments: Images, seed: tuple[int, ...]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A picture, uint8 (side, side), and its annotations, but for their numbers."""
    random = np.random.default_rng(seed)
    canvas = _background(random)
    layers: list[tuple[int, bool, np.ndarray]] = []  # category, whether it is a crowd, the whole mask
    if random.random() < _CROWDED_PICTURES:
        layers.append(_crowd(canvas, garments, random))
    centre = random.uniform(0, SIDE, 2)
    for _ in range(random.integers(1, 5)):
        # Every other one lies near the one before, so that garments hide each other.
        near = random.random() < 0.5
        centre = np.clip(centre + random.normal(0, 12, 2), 0, SIDE) if near else random.uniform(0, SIDE, 2)
        image = int(random.integers(len(garments)))
        mask = _paint(canvas, _pixels(garments, image), random.uniform(14, 44), centre, random)
        layers.append((_CATEGORY_OF[garments.labels[image]], False, mask))
    return canvas, _annotations(layers)


def _background(random: np.random.Generator) -> np.ndarray:
    """Noise on a slope of grey."""
    slope = np.add.outer(*random.uniform(-0.4, 0.4, (2, 1)) * np.arange(SIDE)) + random.uniform(0, 70)
    return np.clip(slope + random.normal(0, 10, (SIDE, SIDE)), 0, 255).astype(np.uint8)


def _crowd(canvas: np.ndarray, garments: Images, random: np.random.Generator) -> tuple[int, bool, np.ndarray]:
    """Many small garments of one kind in one place, told of as one region."""
    label = int(random.integers(len(garments.classes)))
    alike = np.flatnonzero(garments.labels == label)
    place = random.uniform(20, SIDE - 20, 2)
    masks = [
        _paint(
            canvas,
            _pixels(garments, int(random.choice(alike))),
            10,
            place + random.uniform(-14, 14, 2),
            random,
        )
        for _ in range(12)
    ]
    return _CATEGORY_OF[label], True, np.logical_or.reduce(masks)


def _pixels(garments: Images, image: int) -> np.ndarray:
    """uint8 (28, 28)."""
    return garments.read(np.array([image]))[0][:, :, 0]


def _paint(
    canvas: np.ndarray, garment: np.ndarray, size: float, centre: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Paints a garment, `size` pixels wide, over what is there; its mask, bool (side, side)."""
    side = max(2, round(size))
    small = np.asarray(Image.fromarray(garment).resize((side, side), Image.Resampling.BILINEAR))
    if random.random() < 0.5:
        small = small[:, ::-1]
    bright = random.uniform(0.6, 1.0)
    top, left = np.round(centre - side / 2).astype(int)
    rows, columns = slice(max(top, 0), min(top + side, SIDE)), slice(max(left, 0), min(left + side, SIDE))
    small = small[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    mask = np.zeros((SIDE, SIDE), bool)
    mask[rows, columns] = small > _FOREGROUND
    canvas[mask] = (small[small > _FOREGROUND] * bright).astype(np.uint8)
    return mask


def _annotations(layers: list[tuple[int, bool, np.ndarray]]) -> list[dict[str, Any]]:
    """Of what is seen of each layer; later ones lie above."""
    annotations = []
    above = np.zeros((SIDE, SIDE), bool)
    for category, crowd, mask in reversed(layers):
        seen = mask & ~above
        above |= mask
        if seen.sum() < max(_LEAST_SEEN, _LEAST_SHARE * mask.sum()):
            continue
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        left, top = int(columns[0]), int(rows[0])
        annotations.append(
            {
                "category_id": category,
                "iscrowd": int(crowd),
                "area": int(seen.sum()),
                "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
                "segmentation": {"size": [SIDE, SIDE], "counts": run_lengths(seen)},
            }
        )
    return annotations[::-1]


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs down the columns, of 0 and 1 in turn, the first of 0."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(ends, prepend=0, append=flat.size).tolist()
    return [0, *runs] if flat[0] else runs


if __name__ == "__main__":
    main()
