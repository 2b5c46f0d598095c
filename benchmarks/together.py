"""Virtual workers computed together against one by one, and against what no batch norm over slices could beat.

`python benchmarks/together.py [--rows 0,1] [--seconds 60]` times whole steps of the trainer on one process, with
batches that lie ready in memory: g virtual workers of n images apart and together; and a bare loop of torch over one
batch of g·n images, batch norm over all of them, which is another mathematics and the upper bound. The sides take turns
in one run. It prints medians, and how many times as fast as apart the others are.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from limited import names_of
from torch import Tensor
from turns import Step, interleaved

import hvd_lb as lb
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.machine.cpu import describe_cpu, is_slow_in
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer

TURNS, WARM_UP = 15, 2


@dataclass(frozen=True)
class Row:
    model: str
    pixels: int
    images: int
    workers: int
    precision: str = "fp32"
    channels_last: bool = False

    def __str__(self) -> str:
        order = ", channels-last" if self.channels_last else ""
        return f"{self.model} {self.pixels}², {self.workers} × {self.images}, {self.precision}{order}"


ROWS = (
    Row("resnet8", 8, 32, 8),
    Row("resnet18", 64, 8, 8),
    Row("resnet18", 64, 8, 8, "bf16", True),
    Row("resnet50", 64, 4, 8),
    Row("mobilenet_v3_small", 128, 8, 8),
    Row("resnet20", 32, 32, 8),
    Row("resnet18", 224, 8, 4),
)


def trained(row: Row, together: int, parts: list[tuple[Tensor, Tensor]], device: torch.device) -> Step:
    few = ArrayImages(
        np.zeros((8192, 8, 8), np.uint8), np.zeros(8192, np.int64), list("abcdefghij"), "nothing"
    )
    recipe = Recipe(
        model=row.model, image_size=row.pixels, gpus=row.workers, per_gpu_batch=row.images, together=together,
        precision=row.precision, channels_last=row.channels_last, learning_rate=1e-4,
    )  # fmt: skip
    trainer = Trainer(
        recipe,
        Dataset("nothing", few, few),
        lb.current(),
        device=device,
        threads=1,
        observer=SilentObserver(),
    )
    trainer.model.train()
    endless = itertools.cycle(parts)

    def step() -> None:
        with trainer.kernels():
            trainer.train_step(endless)

    return step


def bare(row: Row, parts: list[tuple[Tensor, Tensor]], device: torch.device) -> Step:
    order = torch.channels_last if row.channels_last else torch.contiguous_format
    network = build_model(row.model, 10, seed=0).to(device).to(memory_format=order).train()
    optimizer = torch.optim.SGD(lb.parameter_groups(network), 1e-4, 0.9, nesterov=True, foreach=True)
    images, labels = (torch.cat(of) for of in zip(*parts, strict=True))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=row.precision == "bf16"):
            logits = network(images.to(memory_format=order))
            loss = F.cross_entropy(logits, labels, reduction="sum") / len(labels)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = list(map(str, range(len(ROWS))))
    parser.add_argument("--rows", type=names_of(numbers), default=numbers, help="numbers, with commas")
    parser.add_argument("--seconds", type=float, default=60, help="of a row, about")
    options = parser.parse_args()
    lb.init()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for row in map(ROWS.__getitem__, map(int, options.rows)):
        if device.type == "cpu" and is_slow_in(row.precision, describe_cpu()):
            print(f"{row}: left out, as torch has only slow kernels for it on this CPU", flush=True)
            continue
        torch.manual_seed(0)
        parts = [
            (
                torch.randn(row.images, 3, row.pixels, row.pixels, device=device),
                torch.randint(0, 10, (row.images,), device=device),
            )
            for _ in range(row.workers)
        ]
        sides = {
            "apart": trained(row, 1, parts, device),
            "together": trained(row, row.workers, parts, device),
            "one batch": bare(row, parts, device),
        }
        medians = interleaved(sides, TURNS, WARM_UP, options.seconds)
        figures = ", ".join(
            f"{name} {value:.1f} ms ({medians['apart'] / value:.2f}×)" for name, value in medians.items()
        )
        print(f"{row}: {figures}", flush=True)


if __name__ == "__main__":
    main()
