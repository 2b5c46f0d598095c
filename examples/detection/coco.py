"""Pictures in COCO's format: read into memory, and average precision of what a detector has found in them."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hvd_lb.plan.counter import uniform

Target = dict[str, Tensor]


class Pictures:
    """A split: pictures as float (3, height, width) in 0 … 1, and torchvision's targets, without crowds."""

    def __init__(self, folder: Path, split: str):
        self.annotations = folder / f"{split}.json"
        told = json.loads(self.annotations.read_text())
        objects = defaultdict(list)
        for annotation in told["annotations"]:
            if not annotation["iscrowd"]:
                objects[annotation["image_id"]].append(annotation)
        #: Of the categories in the file, by the network's label less 1: COCO's own have gaps.
        self.categories = sorted(category["id"] for category in told["categories"])
        self.side = max(max(image["width"], image["height"]) for image in told["images"])
        self.ids = [image["id"] for image in told["images"]]
        self._pixels = [_pixels(folder / image["file_name"]) for image in told["images"]]
        labels = {category: label for label, category in enumerate(self.categories, start=1)}
        self._targets = [_target(objects[image["id"]], image, labels) for image in told["images"]]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self._pixels[index] / 255, self._targets[index]

    def augmented(self, indices: np.ndarray, seed: int, epoch: int) -> tuple[list[Tensor], list[Target]]:
        """These pictures, of which every other one is flipped: a function of seed, epoch and picture."""
        flips = uniform(seed, epoch, indices.astype(np.uint64)) < 0.5
        chosen = [
            flipped(*self[index]) if flip else self[index] for index, flip in zip(indices, flips, strict=True)
        ]
        return [picture for picture, _ in chosen], [target for _, target in chosen]


def _pixels(file: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


def _target(objects: list[dict[str, Any]], image: dict[str, Any], labels: dict[int, int]) -> Target:
    height, width = image["height"], image["width"]
    boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [mask_of(one["segmentation"], height, width) for one in objects]
    return {
        "boxes": boxes,
        "labels": torch.tensor([labels[one["category_id"]] for one in objects], dtype=torch.int64),
        "masks": torch.from_numpy(np.array(masks, np.uint8).reshape(-1, height, width)),
    }


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Of polygons, as most of COCO's objects are told, or of run lengths, compressed or not: bool (height, width)."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        counts = segmentation["counts"]
        values = np.arange(len(counts)) % 2 == 1
        return np.repeat(values, counts).reshape(height, width, order="F")
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return coco_mask.decode(segmentation).astype(bool)


def flipped(picture: Tensor, target: Target) -> tuple[Tensor, Target]:
    """From left to right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = picture.shape[-1]
    boxes = torch.stack([width - right, top, width - left, bottom], 1)
    return picture.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


def found_in(image_id: int, output: Target, categories: Sequence[int]) -> list[dict[str, Any]]:
    """What torchvision's detector says of a picture, as COCO's results; its labels count in `categories`, from 1 on."""
    from pycocotools import mask as coco_mask

    boxes = output["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    masks = (output["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
    found = []
    for box, label, score, mask in zip(boxes, output["labels"], output["scores"], masks, strict=True):
        rle = coco_mask.encode(np.asfortranarray(mask))
        found.append(
            {
                "image_id": image_id,
                "category_id": categories[int(label) - 1],
                "bbox": box.tolist(),
                "score": float(score),
                "segmentation": {**rle, "counts": rle["counts"].decode()},
            }
        )
    return found


def average_precision(annotations: Path, found: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's AP (mean over IoU 0.5 … 0.95) and AP at IoU 0.5, of boxes and masks, in per cent."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    figures = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        results = truth.loadRes(found) if found else COCO()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            if not found:
                figures |= {f"{name}_ap": 0.0, f"{name}_ap50": 0.0}
                continue
            evaluation = COCOeval(truth, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures |= {
                f"{name}_ap": 100 * float(evaluation.stats[0]),
                f"{name}_ap50": 100 * float(evaluation.stats[1]),
            }
    return figures
