"""Images a second from files to augmented tensors: our loaders, torchvision's DataLoader, and decoding alone.

All in one run on the same files, taking turns, with the same number of threads or workers: JPEGs of 500×375 to
224×224 with antialias, and PNGs of 28×28. Prints the median and the range of each, the ratio to the fastest variant of
torchvision's, and the CPU time an image takes, which tells the same on a machine that others use.

    python benchmarks/loader.py [--threads 2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.data.loading.shared_pixels import cached
from hvd_lb.data.prepare.pack import pack
from hvd_lb.plan.augment import Microbatch, RandomWindows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64
# More than any side has decoded when its turn comes; what it has read is read anew while these are taken.
AHEAD = 10

Batches = Iterator[object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of ours, workers of torchvision's")
    parser.add_argument("--batches", type=int, default=10, help="batches of 64 in each measurement")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a DataLoader's workers
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HVD_LB_CACHE"] = str(Path(temporary) / "cache")
        for name, folder, size in (
            ("500x375 JPEG to 224x224", make_jpegs(Path(temporary) / "jpeg"), 224),
            ("28x28 PNG", make_pngs(Path(temporary) / "png"), 28),
        ):
            with ExitStack() as stack:
                sides = open_sides(folder, size, options.threads, stack)
                took = take_turns(sides, options.batches, options.rounds)
            load = os.getloadavg()[0]
            print(f"{name}, {options.threads} threads or workers, load average {load:.1f}:")
            report(took)


def open_sides(folder: Path, size: int, threads: int, stack: ExitStack) -> dict[str, Batches]:
    """Every side, endless, with its batches made ahead."""
    opened = open_dataset(str(folder))
    images, pixels = opened.train, Preprocessing(size, MEAN, STD, antialias=True)
    pack(opened, folder / "packed", source=str(folder))
    shards = open_dataset(str(folder / "packed")).train
    kept, file = cached(opened, "memory", f"benchmark {os.getpid()}")
    file.unlink()
    for i in range(len(images)):
        kept.train.read(np.array([i]))
    sides: dict[str, Batches] = {}
    for name, kind, ours in (
        ("hvd-lb dali, folder", "dali", images),
        ("hvd-lb dali, tar", "dali", shards),
        ("hvd-lb torchvision", "torchvision", images),
        ("hvd-lb, cache memory", "dali", kept.train),
    ):
        sides[name] = stack.enter_context(
            open_loader(
                kind,
                ours,
                microbatches(ours),
                pixels,
                batch_size=BATCH,
                device=torch.device("cpu"),
                threads=threads,
            )
        )
    files = [images.name(i) for i in range(len(images))]
    for name, dataset in (
        ("torchvision, PIL", ImageFolder(str(folder / "train"), transform(size, v2.ToImage()))),
        (
            "torchvision, tensors",
            ImageFolder(
                str(folder / "train"), transform(size), loader=partial(decode_image, mode=ImageReadMode.RGB)
            ),
        ),
    ):
        endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
        sides[name] = iter(
            torch.utils.data.DataLoader(dataset, BATCH, sampler=endless, num_workers=threads, drop_last=True)
        )
    if files[0].endswith("jpg"):
        sides["decoding alone"] = decoding_alone(files, threads)
    return sides


def transform(size: int, *to_tensor: Callable[..., object]) -> Callable[..., object]:
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            *to_tensor,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def microbatches(images: Images, size: int = BATCH) -> Iterator[Microbatch]:
    """Endless random microbatches of so many images."""
    rng, windows = np.random.default_rng(0), RandomWindows(seed=0)
    for epoch in itertools.count():
        order = rng.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            ids = order[start : start + size]
            yield Microbatch(ids, windows.windows(epoch, ids, images.widths[ids], images.heights[ids]))


def decoding_alone(files: list[str], threads: int) -> Batches:
    """libjpeg-turbo on whole images that are in memory: the most that any loader could do."""
    contents = [read_file(file) for file in files]
    with ThreadPoolExecutor(threads) as pool:
        for start in itertools.count(step=BATCH):
            batch = (contents[i % len(contents)] for i in range(start, start + BATCH))
            list(pool.map(decode_image, batch))
            yield None


def take_turns(sides: dict[str, Batches], batches: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds an image of each side, round by round."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            settle()
            for _ in range(AHEAD):
                next(side)
            began, cpu = time.perf_counter(), cpu_seconds()
            for _ in range(batches):
                next(side)
            images = batches * BATCH
            took[name].append(((time.perf_counter() - began) / images, (cpu_seconds() - cpu) / images))
    return took


def settle() -> None:
    """Waits until the side before has read ahead what it wants, so that it takes nothing from the next one's turn."""
    while True:
        before = cpu_seconds()
        time.sleep(0.2)
        if cpu_seconds() - before < 0.02:
            return


def cpu_seconds() -> float:
    """Of this process and of the workers that run."""
    workers = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        workers += int(fields[11]) + int(fields[12])
    return time.process_time() + workers / os.sysconf("SC_CLK_TCK")


def report(took: dict[str, list[tuple[float, float]]]) -> None:
    fastest = min(
        statistics.median(seconds for seconds, _ in took[name])
        for name in took
        if "PIL" in name or "tensors" in name
    )
    for name, measured in took.items():
        seconds = [of for of, _ in measured]
        median, cpu = statistics.median(seconds), statistics.median(of for _, of in measured)
        print(
            f"  {name:22}{1 / median:7.0f} images/s ({1 / max(seconds):.0f} to {1 / min(seconds):.0f})"
            f"  ratio {fastest / median:5.2f}  CPU {1e3 * cpu:.3f} ms an image"
        )


def make_jpegs(folder: Path, count: int = 512) -> Path:
    """Smooth noise with grain: about 90 kB each, which decode like photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (18, 25, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        grainy = np.clip(smooth + rng.normal(0, 13, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(place(folder, i, "jpg"), quality=90)
    return folder


def make_pngs(folder: Path) -> Path:
    """Grey blots on black."""
    rng = np.random.default_rng(0)
    for i in range(4096):
        blot = Image.fromarray(rng.integers(0, 256, (7, 7), dtype=np.uint8)).resize((28, 28))
        Image.fromarray(np.maximum(np.asarray(blot).astype(int) - 100, 0).astype(np.uint8)).save(
            place(folder, i, "png")
        )
    return folder


def place(folder: Path, i: int, ending: str) -> Path:
    of_class = folder / ("val" if i < 8 else "train") / f"class{i % 4}"
    of_class.mkdir(parents=True, exist_ok=True)
    return of_class / f"{i}.{ending}"


if __name__ == "__main__":
    main()
