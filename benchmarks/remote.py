"""Images a second from a web server whose every answer takes 20 ms longer, beside the same shards on this disk.

Ours with and without the local cache, in the order of the plan; and, as the plain way, webdataset streaming the same
URLs through curl, in the order of the shards with a shuffle buffer. All decode and augment alike, in one run.

    python benchmarks/remote.py [--latency 0.02] [--seconds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import torch
import webdataset
from loader import BATCH, MEAN, STD, cpu_seconds, make_jpegs, microbatches, transform
from torchvision.transforms import v2

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.data.prepare.pack import pack

SERVER = Path(__file__).parents[1] / "tests" / "web_server.py"
SIDE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, after two seconds")
    parser.add_argument("--threads", type=int, default=2, help="that decode, and webdataset's processes")
    parser.add_argument("--images", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        root = Path(temporary)
        os.environ["HVD_LB_CACHE"] = str(root / "cache")
        packed = root / "www"
        folder = make_jpegs(root / "jpeg", options.images)
        pack(open_dataset(str(folder)), packed, source="jpeg", shard_bytes=20_000_000)
        url = stack.enter_context(server(packed, options.latency))
        local = measure(ours(open_dataset(str(packed)).train, options), options.seconds)
        show("the shards on this disk", local, local)
        os.environ["HVD_LB_DATA_CACHE"] = "0"
        images = open_dataset(url).train
        show("hvd-lb, no cache", measure(ours(images, options), options.seconds), local)
        os.environ["HVD_LB_DATA_CACHE"] = "1TB"
        images = open_dataset(url, expected=open_dataset(str(packed)).fingerprint()).train
        show("hvd-lb, an empty cache", measure(ours(images, options), options.seconds), local)
        for ids in np.array_split(np.arange(len(images)), 64):
            images.read(ids)
        show("hvd-lb, all in the cache", measure(ours(images, options), options.seconds), local)
        show("webdataset through curl", measure(streamed(url, packed, options), options.seconds), local)


@contextmanager
def server(folder: Path, latency: float) -> Iterator[str]:
    """In a process of its own: its URL."""
    command = [sys.executable, SERVER, folder, str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


def ours(images: Images, options: argparse.Namespace) -> Iterator[object]:
    with open_loader(
        "dali",
        images,
        microbatches(images),
        Preprocessing(SIDE, MEAN, STD, antialias=True),
        batch_size=BATCH,
        device=torch.device("cpu"),
        threads=options.threads,
    ) as loader:
        yield from loader


def streamed(url: str, packed: Path, options: argparse.Namespace) -> Iterator[object]:
    names = sorted(path.name for path in packed.glob("train-*.tar"))
    urls = [f"pipe:curl -sSf {url}/{name}" for name in names]
    dataset = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform(SIDE, v2.ToImage()), int)
    )
    yield from torch.utils.data.DataLoader(dataset, BATCH, num_workers=options.threads)


def measure(batches: Iterator[object], seconds: float) -> tuple[float, float]:
    """Images a second once it has run for two, and milliseconds of CPU for each, those of child processes included."""
    with closing(batches):  # type: ignore[type-var]
        until = time.perf_counter() + 2
        while time.perf_counter() < until:
            next(batches)
        began, busy, count = time.perf_counter(), cpu_seconds(), 0
        while (now := time.perf_counter()) < began + seconds:
            next(batches)
            count += BATCH
        return count / (now - began), 1e3 * (cpu_seconds() - busy) / count


def show(name: str, found: tuple[float, float], local: tuple[float, float]) -> None:
    rate, cpu = found
    print(
        f"{name:26} {rate:6.0f} images/s  {rate / local[0]:5.2f} of the disk's  {cpu:5.2f} ms of CPU an image"
    )


if __name__ == "__main__":
    main()
