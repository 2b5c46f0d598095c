"""What a data set is to the rest of the house: two splits of lazily read images with known labels and sizes.

Sizes belong to it because crop windows are computed from them before any image is decoded (docs/design.md,
augmentation); a loader (`hvd_lb.data.loading.open`) then only executes windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""

_CHUNK = 1 << 16


class Images(Protocol):
    """One split. Opening it is cheap, reading lazy; `read` may be called from several threads."""

    @property
    def classes(self) -> list[str]:
        """Class names; the index is the label."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""

    @property
    def widths(self) -> np.ndarray:
        """int32 (N,), pixels as stored: EXIF orientation is ignored. 0 where the header is broken."""

    @property
    def heights(self) -> np.ndarray:
        """int32 (N,), pixels as stored. 0 where the header is broken."""

    @property
    def encoded(self) -> bool:
        """True when `read` gives the bytes of image files, False when it gives pixels."""

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """uint8 arrays: (bytes,) when encoded, else (height, width, 3).

        UserError for what cannot be read, also after some tries (`hvd_lb.data.files.reading`).
        """

    def name(self, image_id: int) -> str:
        """The path or the like, for messages."""


@dataclass(frozen=True)
class Dataset:
    """A named pair of splits with the same classes."""

    name: str
    train: Images
    val: Images

    def fingerprint(self) -> str:
        """Hash of what fixes the mathematics: classes, labels and sizes of both splits, in order.

        The same for every copy of a data set: where it lies and how it is stored play no part.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.val):
            digest.update("\0".join([str(len(split)), *split.classes, ""]).encode())
            for values, dtype in ((split.labels, "<i8"), (split.widths, "<i4"), (split.heights, "<i4")):
                for start in range(0, len(split), _CHUNK):
                    digest.update(values[start : start + _CHUNK].astype(dtype).tobytes())
        return digest.hexdigest()[:16]


class ArrayImages:
    """Pixels in memory: uint8 (N, H, W), grey, or (N, H, W, 3). Grey becomes three channels when read."""

    encoded = False

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: list[str], title: str) -> None:
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (3, 4)
            or (pixels.ndim == 4 and pixels.shape[3] != 3)
        ):
            raise ValueError(
                f"{title}: pixels are {pixels.dtype} {pixels.shape}, not uint8 (N, H, W) or (N, H, W, 3)"
            )
        if len(pixels) != len(labels):
            raise ValueError(f"{title}: {len(pixels)} images but {len(labels)} labels")
        self._pixels = pixels
        self._title = title
        self.classes = classes
        self.labels = labels.astype(np.int64)
        self.widths = np.broadcast_to(np.int32(pixels.shape[2]), len(pixels))
        self.heights = np.broadcast_to(np.int32(pixels.shape[1]), len(pixels))

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        chosen = self._pixels[ids]
        if chosen.ndim == 3:
            chosen = np.repeat(chosen[..., None], 3, axis=3)
        return list(chosen)

    def name(self, image_id: int) -> str:
        return f"{self._title}[{image_id}]"
