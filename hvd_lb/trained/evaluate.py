"""Errors of trained weights on a data set: the very evaluation of a training, after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hvd_lb import arithmetic
from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Dataset, Images, Progress
from hvd_lb.data.index.dataset import index_splits
from hvd_lb.data.index.images import IndexedImages
from hvd_lb.data.sources.names import some
from hvd_lb.data.spec import is_named
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Origin
from hvd_lb.report.text import printable
from hvd_lb.trained.weights import Trained
from hvd_lb.training.bad_images import BadImages, Record
from hvd_lb.training.batchnorm import allow_single_values
from hvd_lb.training.evaluation import Evaluation, Evaluator
from hvd_lb.training.models import freeze_backbone
from hvd_lb.world.solo import Solo


class Relabelled:
    """Images whose classes are named as others are: labels are those of `classes`."""

    def __init__(self, images: Images, classes: list[str]) -> None:
        position = {name: label for label, name in enumerate(classes)}
        if unknown := [name for name in images.classes if name not in position]:
            raise UserError(
                f"classes {some(unknown)} are not among those that were trained ({some(classes)}): give a data set of "
                "these classes"
            )
        self._images = images
        self.classes, self.encoded = classes, images.encoded
        self.labels = np.array([position[name] for name in images.classes])[images.labels]
        self.widths, self.heights = images.widths, images.heights

    def __len__(self) -> int:
        return len(self._images)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        return self._images.read(ids)

    def name(self, image_id: int) -> str:
        return self._images.name(image_id)

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        return self._images.evidence(start, stop)


@dataclass(frozen=True)
class Evaluated:
    """Figures over the images of `what`; `bad` tells of those that could not be decoded and were left out."""

    what: str
    figures: Evaluation
    bad: list[Record]


def open_images(
    trained: Trained,
    data: str,
    *,
    val: str | None,
    val_fraction: float | None,
    split: str,
    on_progress: Progress | None = None,
) -> tuple[str, Images, tuple[str, ...]]:
    """The name and the images of a data set's `split`, "val" or "train", under the labels of the trained classes, and
    what a user should know of how they were found.

    Of a folder or list without a validation split all images are taken.
    """
    if not is_named(data) and val is None and val_fraction is None:
        indexes, notes = index_splits(data, on_progress=on_progress)
        if "val" not in indexes:
            images = IndexedImages(indexes["train"])
            if not len(images):
                raise UserError(f"{data}: holds no images; expected a folder of images for each class")
            return f"all of {data}", _as_trained(images, trained), notes
    dataset = open_dataset(
        data,
        val=val,
        val_fraction=val_fraction,
        on_progress=on_progress,
        on_bad_image=trained.recipe.on_bad_image,
    )
    return f"{split} of {dataset.name}", _as_trained(_split(dataset, split), trained), dataset.notes


def _split(dataset: Dataset, split: str) -> Images:
    return dataset.train if split == "train" else dataset.val


def _as_trained(images: Images, trained: Trained) -> Images:
    if trained.classes is None:
        _refuse_unnamed(images.classes, trained)
        return images
    return images if images.classes == trained.classes else Relabelled(images, trained.classes)


def _refuse_unnamed(classes: list[str], trained: Trained) -> None:
    """UserError where nothing names the outputs and the classes are not one for each, nor numbers of outputs."""
    if len(classes) > trained.outputs:
        raise UserError(
            f"{len(classes)} classes for a network of {trained.outputs} outputs: give the data it was trained on"
        )
    if len(classes) < trained.outputs and classes != [str(number) for number in range(len(classes))]:
        raise UserError(
            f"{printable(str(trained.file))} does not name its {trained.outputs} outputs, so which of them the "
            f"{len(classes)} classes {some(classes)} are is not known: give a folder for each output, some of them "
            "empty, or a list with a classes.txt of all"
        )


def evaluate(
    trained: Trained,
    images: Images,
    what: str,
    *,
    device: torch.device,
    threads: int,
    on_progress: Callable[[int], object] = lambda images: None,
) -> Evaluated:
    """As training does it on one process: the same batches, pixels, kernels and sums, and so the same bits.

    `on_progress` is told of how many images have gone through.
    """
    recipe, world = trained.recipe, Solo()
    bad: list[Record] = []
    accounts = BadImages(world, recipe.on_bad_image == "skip", 1.0, bad.extend)  # how many they are is told
    evaluator = Evaluator.of(recipe, images, device, threads, accounts)
    model = trained.network(device)
    allow_single_values(model)
    if recipe.freeze == "backbone":  # what is compiled together depends on what learns
        freeze_backbone(model)
    forward = arithmetic.compiled(model) if recipe.compile else model
    step = max(0, trained.checkpoint.step - 1) if trained.checkpoint else 0

    def before_batch(done: int, of: int) -> int:
        on_progress(done * recipe.per_gpu_batch)
        return 0

    with arithmetic.kernels(recipe):
        figures = evaluator(
            forward, world, arithmetic.autocast(recipe, device), Origin("eval", 0, step, 0), before_batch
        )
    on_progress(len(images))
    return Evaluated(what, figures, bad)
