"""Takes a folder of broken images through index, verification and training, in a process whose end and size show."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.prepare.verify import verify
from hvd_lb.machine.process import peak_memory
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

MAX_PIXELS = 20_000_000


class Told(SilentObserver):
    def __init__(self) -> None:
        self.bad: list[dict[str, Any]] = []
        self.images = 0

    def bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        self.bad += records

    def evaluation(self, record: dict[str, Any]) -> None:
        self.images = record["images"]


def main(folder: str, loader: Any) -> None:
    torch.set_num_threads(1)
    data = open_dataset(folder, on_bad_image="skip")
    failed = {
        name: [failure.image for failure in verify(split, loader, threads=2, max_pixels=MAX_PIXELS)]
        for name, split in (("train", data.train), ("val", data.val))
    }
    recipe = Recipe(
        model="resnet8", image_size=8, gpus=2, per_gpu_batch=32, epochs=1, last_batch="keep", loader=loader,
        on_bad_image="skip", max_bad_images=1.0, max_pixels=MAX_PIXELS,
    )  # fmt: skip
    told = Told()
    trainer = Trainer(recipe, data, Solo(), device=torch.device("cpu"), threads=2, observer=told)
    trainer.fit()
    found = {
        "images": {"train": len(data.train), "val": len(data.val)},
        "failed": failed,
        "bad": told.bad,
        "evaluated": told.images,
        "finite": all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters()),
        "peak": peak_memory(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
