"""Images a second from JPEG files to augmented tensors: our loaders against torchvision's DataLoader.

All in one run on the same files, taking turns, with the same number of threads or workers. Prints the median of
each and the ratios to torchvision's.

    python benchmarks/loader.py [--threads 2] [--batches 24]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from hvd_lb.data import Images, open_dataset
from hvd_lb.data.loader import Pixels, open_loader
from hvd_lb.plan.augment import Microbatch, RandomWindows

WIDTH, HEIGHT, QUALITY = 500, 375, 90
IMAGES, BATCH = 512, 64
PIXELS = Pixels(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), antialias=True)


def make_images(folder: Path) -> None:
    """Smooth noise with grain: about 90 kB each, which decode like photographs."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        coarse = rng.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        grainy = np.clip(smooth + rng.normal(0, 13, smooth.shape), 0, 255).astype(np.uint8)
        place = folder / ("val" if i < 8 else "train") / f"class{i % 4}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grainy).save(place / f"{i}.jpg", quality=QUALITY)


def microbatches(images: Images) -> Iterator[Microbatch]:
    rng, windows = np.random.default_rng(0), RandomWindows(seed=0)
    for epoch in itertools.count():
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            ids = order[start : start + BATCH]
            yield Microbatch(ids, windows.windows(epoch, ids, images.widths[ids], images.heights[ids]))


def ours(kind: str, images: Images, threads: int, batches: int) -> float:
    device = torch.device("cpu")
    stream = microbatches(images)
    with open_loader(
        kind, images, stream, PIXELS, batch_size=BATCH, device=device, threads=threads
    ) as loader:
        return rate(loader, batches)


def torchvisions(folder: Path, workers: int, batches: int) -> float:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(PIXELS.image_size, antialias=PIXELS.antialias),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PIXELS.mean, PIXELS.std),
        ]
    )
    dataset = ImageFolder(str(folder / "train"), transform)
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(dataset, BATCH, sampler=endless, num_workers=workers, drop_last=True)
    return rate(iter(loader), batches)


def rate(loader: Iterator[object], batches: int) -> float:
    """Images a second once running: batches that may have been made ahead are let go first."""
    for _ in range(10):
        next(loader)
    began = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batches * BATCH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of ours, workers of torchvision's")
    parser.add_argument("--batches", type=int, default=24, help=f"batches of {BATCH} in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HVD_LB_CACHE"] = str(folder / "cache")
        make_images(folder)
        images = open_dataset(str(folder)).train
        contestants: dict[str, Callable[[], float]] = {
            "torchvision DataLoader": lambda: torchvisions(folder, options.threads, options.batches),
            "hvd-lb dali": lambda: ours("dali", images, options.threads, options.batches),
            "hvd-lb torchvision": lambda: ours("torchvision", images, options.threads, options.batches),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name, measure in contestants.items():
                rates[name].append(measure())
    baseline = statistics.median(rates["torchvision DataLoader"])
    print(
        f"{WIDTH}x{HEIGHT} JPEG to {PIXELS.image_size}x{PIXELS.image_size}, {options.threads} threads or workers:"
    )
    for name, measured in rates.items():
        median, low, high = statistics.median(measured), min(measured), max(measured)
        print(f"{name:24}{median:7.0f} images/s ({low:.0f} to {high:.0f})  ratio {median / baseline:.2f}")


if __name__ == "__main__":
    main()
