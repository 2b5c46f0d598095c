"""Images a second where every file takes a while to come: our loader, and torch's DataLoader, in one run.

A file takes 0, 1, 5 or 20 ms more than it does from the page cache. Two things bound what can be had: as many reads as
can be under way at once (64 in ours) divided by the time of one, and what the same loader does with files that take no
time. Prints how much of the lower of both each loader reaches, with small PNGs.

    python benchmarks/latency.py [--seconds 4] [--workers 16] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from loader import BATCH, MEAN, STD, make_pngs, microbatches, transform
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.files.threads import MOST_THREADS
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader

SIDE = 28
LATENCIES = (0.0, 0.001, 0.005, 0.02)


class Late:
    """`images`, each of which takes so many seconds more to read."""

    def __init__(self, images: Images, seconds: float) -> None:
        self._images, self._seconds = images, seconds
        self.classes, self.encoded = images.classes, images.encoded
        self.labels, self.widths, self.heights = images.labels, images.widths, images.heights

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        if self._seconds:
            time.sleep(len(ids) * self._seconds)
        return self._images.read(ids)

    def name(self, image_id: int) -> str:
        return self._images.name(image_id)


class LateFolder(ImageFolder):
    """torchvision's, with as late files."""

    seconds = 0.0

    def __getitem__(self, index: int) -> object:
        if self.seconds:
            time.sleep(self.seconds)
        return super().__getitem__(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, after a second")
    parser.add_argument("--workers", type=int, default=16, help="processes of torch's DataLoader")
    parser.add_argument("--threads", type=int, default=2, help="that decode in ours")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HVD_LB_CACHE"] = str(Path(temporary) / "cache")
        folder = make_pngs(Path(temporary) / "png")
        images = open_dataset(str(folder)).train
        for name, at_once, measure in (
            ("hvd-lb", MOST_THREADS, lambda late: ours(images, late, options)),
            (
                f"torch, {options.workers} workers",
                options.workers,
                lambda late: torchs(folder, late, options),
            ),
        ):
            without = 0.0
            for late in LATENCIES:
                rate = measure(late)
                without = without or rate
                possible = min(without, at_once / late) if late else without
                print(
                    f"{name:20} {1e3 * late:3.0f} ms a file  {rate:6.0f} images/s"
                    f"  {rate / possible:5.2f} of what {at_once} reads at once allow",
                    flush=True,
                )


def ours(images: Images, late: float, options: argparse.Namespace) -> float:
    with open_loader(
        "dali",
        Late(images, late),
        microbatches(images),
        Preprocessing(SIDE, MEAN, STD, antialias=True),
        batch_size=BATCH,
        device=torch.device("cpu"),
        threads=options.threads,
    ) as loader:
        return rate(loader, options.seconds)


def torchs(folder: Path, late: float, options: argparse.Namespace) -> float:
    dataset = LateFolder(str(folder / "train"), transform(SIDE, v2.ToImage()))
    dataset.seconds = late
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    return rate(
        iter(torch.utils.data.DataLoader(dataset, BATCH, sampler=endless, num_workers=options.workers)),
        options.seconds,
    )


def rate(batches: Iterator[object], seconds: float) -> float:
    """Images a second, once it has run for a second."""
    count, began = 0, 0.0
    first = time.perf_counter()
    while True:
        next(batches)
        now = time.perf_counter()
        if began:
            count += BATCH
            if now - began >= seconds:
                return count / (now - began)
        elif now - first >= 1:
            began = now


if __name__ == "__main__":
    main()
