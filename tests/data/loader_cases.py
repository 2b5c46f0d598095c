"""What the tests of the loaders share: encoded images in memory, microbatches, and tensors of levels."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.plan.augment import Drawn, Flip, Microbatch, RandomWindows, Windows

KINDS = ["dali", "torchvision"]
CPU = torch.device("cpu")


class BlobImages:
    """Encoded images in memory."""

    encoded = True
    classes = ["any"]

    def __init__(self, blobs: list[np.ndarray], sizes: list[tuple[int, int]]) -> None:
        self.blobs = blobs
        self.labels = np.arange(len(blobs), dtype=np.int64)
        self.widths, self.heights = np.array(sizes, np.int32).T

    def __len__(self) -> int:
        return len(self.blobs)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        return [self.blobs[i] for i in ids]

    def name(self, image_id: int) -> str:
        return f"blob {image_id}"


class AtOnce:
    """How many threads waited at the same time, at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def wait(self, seconds: float) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(seconds)
        with self._lock:
            self.now -= 1


def as_levels(size: int, antialias: bool = True) -> Preprocessing:
    """Tensors that hold the levels 0 to 255."""
    return Preprocessing(size, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), antialias)


def random_batches(images: Images, count: int, seed: int = 0) -> list[Microbatch]:
    ids = np.arange(len(images), dtype=np.int64)
    windows = RandomWindows(seed)
    return [
        Microbatch(ids, windows.windows(epoch, ids, images.widths, images.heights)) for epoch in range(count)
    ]


def one_window(ids: list[int], x: int, y: int, size: int, flip: bool) -> Microbatch:
    def full(value: int) -> np.ndarray:
        return np.full(len(ids), value, np.int32)

    flips = Drawn(Flip(), full(flip).astype(bool))
    return Microbatch(np.array(ids, np.int64), Windows(full(x), full(y), full(size), full(size), (flips,)))


def flips_of(windows: Windows) -> np.ndarray:
    """bool (b,): which images are mirrored."""
    (drawn,) = windows.augmentations
    return drawn.parameters


def load(kind: str, images: Images, batches: list[Microbatch], pixels: Preprocessing) -> list[torch.Tensor]:
    size = max(len(batch.image_ids) for batch in batches)
    with open_loader(kind, images, batches, pixels, batch_size=size, device=CPU, threads=2) as loader:
        return [x.clone() for x, _ in loader]
