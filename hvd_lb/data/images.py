"""What a data set is to the rest of the house: two splits of lazily read images with known labels and sizes.

Sizes belong to it because crop windows are computed from them before any image is decoded (docs/design.md,
augmentation); a loader (`hvd_lb.data.loading.open`) then only executes windows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from hvd_lb.errors import UserError

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and of how much."""

_CHUNK = 1 << 16
_HASHED_BYTES = 4_000_000  # of pixels in memory


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

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        """Of images `start` … `stop` − 1, to be hashed: what is known of their bytes, and of their names and places."""


@dataclass(frozen=True)
class Dataset:
    """A named pair of splits with the same classes. `notes` are what a user should know of how they were read,
    `class_folders` folders in which each folder is a class, so that nothing else may come to lie there.
    """

    name: str
    train: Images
    val: Images
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    class_folders: tuple[Path, ...] = field(default=(), kw_only=True)

    def refuse_among_classes(self, folder: Path) -> None:
        """UserError where what is written into `folder` would be taken for a class, or for its images."""
        for classes in self.class_folders:
            inside = os.path.relpath(os.path.realpath(folder), os.path.realpath(classes)).split(os.sep)
            if inside[0] != os.pardir and not any(name.startswith(".") for name in inside if name != "."):
                raise UserError(
                    f"{folder} lies in {classes}, where each folder is a class of images: choose a folder outside of it"
                )

    def fingerprint(self) -> str:
        """What the data are, in three hashes of both splits, in order: of classes, labels and sizes; of bytes; of names
        and places.

        The same for every copy of a data set; the first two also for one that was renamed or packed: `same_images`.
        """
        kinds, contents, places = (hashlib.sha256() for _ in range(3))
        for split in (self.train, self.val):
            kinds.update(os.fsencode("\0".join([str(len(split)), *split.classes, ""])))
            for values, dtype in ((split.labels, "<i8"), (split.widths, "<i4"), (split.heights, "<i4")):
                for start in range(0, len(split), _CHUNK):
                    kinds.update(values[start : start + _CHUNK].astype(dtype).tobytes())
            for start in range(0, len(split), _CHUNK):
                content, place = split.evidence(start, min(start + _CHUNK, len(split)))
                contents.update(content)
                places.update(place)
        return "-".join(of.hexdigest()[:16] for of in (kinds, contents, places))


def images_of(fingerprint: str) -> str:
    """The part of a fingerprint that names and places do not change."""
    return "-".join(fingerprint.split("-")[:2])


def same_images(known: str, present: str) -> bool:
    """Whether these are fingerprints of the same images in the same order, whatever their names and places.

    Older fingerprints had only the hash of classes, labels and sizes; then no more is compared.
    """
    pairs = zip(images_of(known).split("-"), images_of(present).split("-"), strict=False)
    return all(of == now for of, now in pairs)


def refuse_other_images(checkpoint: Path, known: str, present: str, name: str) -> None:
    """UserError where `known`, the fingerprint in a checkpoint, is of other images than the data set `name` has."""
    if not same_images(known, present):
        raise UserError(
            f"checkpoint {checkpoint} was trained on other data than {name} is now (images, their bytes, labels "
            "or sizes differ): give the data set it began with, or another --output"
        )


def fingerprint_note(known: str, present: str) -> str:
    """What a user should know where these are of the same images, but not the same; else nothing."""
    if known == present:
        return ""
    if "-" not in known:
        return (
            "was made by an older version, which kept no check of the images' bytes: only that classes, labels and "
            "sizes are the same is known"
        )
    return "was trained on the same images under other names or packed otherwise"


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

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        """Of many pixels those of every so manieth image."""
        every = self._pixels.nbytes // _HASHED_BYTES + 1
        return self._pixels[start:stop:every].tobytes(), b""
