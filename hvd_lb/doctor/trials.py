"""The selftest's trials that need libraries: `python -m hvd_lb.doctor.trials allreduce|pixels cpu|cuda`."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import torch
from PIL import Image

from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.plan.augment import Microbatch, RandomWindows
from hvd_lb.world import init, shutdown

_SIZES = ((500, 375), (333, 500), (640, 480), (224, 224), (97, 61), (1024, 768), (301, 299), (128, 512))


def allreduce(device: str) -> None:
    """One process of several: adds its numbers and exits with 1 when the sum is not everybody's."""
    world = init(watched=True)
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    for count in (1, 1_000_003):
        numbers = torch.arange(count, dtype=torch.float64, device=device)
        # By the engine; then as gradients are added up, which is in shared memory where processes have one.
        room = world.room(f"selftest.{count}", count, numbers.dtype, numbers.device)
        for place in (torch.empty_like(room), room):
            found = world.allreduce(torch.add(numbers, world.rank, out=place), name=f"selftest.{count}")
            if not torch.equal(found, numbers * world.size + sum(range(world.size))):
                sys.exit(f"rank {world.rank} of {world.size} got a wrong sum of {count} numbers")
    shutdown()


def pixels(device: str) -> None:
    """Prints the mean and the largest difference of the two loaders' pixels, in levels of 255."""
    images = Photographs()
    ids = np.arange(len(images))
    windows = RandomWindows(seed=0).windows(0, ids, images.widths, images.heights)
    levels = Preprocessing(128, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), antialias=True)
    options = {"batch_size": len(ids), "device": torch.device(device), "threads": 1}
    tensors = []
    for kind in ("dali", "torchvision"):
        with open_loader(kind, images, [Microbatch(ids, windows)], levels, **options) as loader:
            tensors.append(next(loader)[0].cpu())
    difference = (tensors[0] - tensors[1]).abs()
    print(json.dumps([float(difference.mean()), float(difference.max())]))


class Photographs:
    """A split of a data set (hvd_lb.data.images.Images): smooth noise in JPEG, much like photographs."""

    encoded = True
    classes = ["noise"]

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._files = [_photograph(generator, *size) for size in _SIZES]
        self.labels = np.zeros(len(_SIZES), np.int64)
        self.widths, self.heights = np.array(_SIZES, np.int32).T

    def __len__(self) -> int:
        return len(self._files)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        return [self._files[image_id] for image_id in ids]

    def name(self, image_id: int) -> str:
        return f"generated photograph {image_id}"

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        return b"".join(file.tobytes() for file in self._files[start:stop]), b""


def _photograph(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    coarse = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return np.frombuffer(buffer.getvalue(), np.uint8)


if __name__ == "__main__":
    {"allreduce": allreduce, "pixels": pixels}[sys.argv[1]](sys.argv[2])
