"""The images of a small data set, decoded once and shared by the processes of a host: `--cache memory|disk`.

One file holds a mark and the pixels of every image, at places that follow from the index. Whoever decodes an image
first writes its pixels and then its mark, their checksum, which every process checks when it meets the image first:
what a killed writer left unfinished is decoded again. Processes need no lock, as all write the same; the threads of one
wait for each other, as the next microbatches may hold the same image.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import features

from hvd_lb.data.decoding import decode, essential
from hvd_lb.data.decoding.decode import check_header, decode_image
from hvd_lb.data.images import Dataset, Images
from hvd_lb.data.index.dataset import IndexedDataset
from hvd_lb.data.loading.shared_file import SharedFile, discard_unused
from hvd_lb.data.options import MAX_PIXELS, CacheKind, LoaderKind
from hvd_lb.errors import UserError
from hvd_lb.machine.cache_folder import cache_folder

MEMORY = Path("/dev/shm")
_LIBRARIES = ("pil", "libjpeg_turbo", "webp", "avif", "libtiff")
_PATTERN = "hvd-lb-*.pixels"
_MARK_BYTES = 8
_LOCKS = 256
_SET = 1 << 32  # so that no checksum is the mark of what was never written


class SharedPixels:
    """uint8 pixels of whole images by their number, in a shared file; `widths` and `heights` are (N,)."""

    def __init__(self, path: Path, widths: np.ndarray, heights: np.ndarray) -> None:
        self._widths, self._heights = widths, heights
        bytes_each = 3 * widths.astype(np.int64) * heights
        self._ends = np.cumsum(bytes_each)
        marks = _MARK_BYTES * len(widths)
        self.file = SharedFile(path, marks + int(bytes_each.sum()))
        self._marks = self.file.content[:marks].view(np.uint64)
        self._content = self.file.content[marks:]
        self._checked = np.zeros(len(widths), bool)
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def alone(self, number: int) -> threading.Lock:
        """Held by the thread of this process that looks for an image, and decodes it if it is not there."""
        return self._locks[number % _LOCKS]

    def get(self, number: int) -> np.ndarray | None:
        """uint8 (height, width, 3), mapped and not to be written; None for what is not there, or not whole."""
        mark = int(self._marks[number])
        if not mark:
            return None
        pixels = self._place(number)
        if not self._checked[number]:
            if _mark(pixels) != mark:
                return None
            self._checked[number] = True
        pixels.flags.writeable = False
        return pixels

    def put(self, number: int, pixels: np.ndarray) -> None:
        self._place(number)[...] = pixels
        self._marks[number] = _mark(pixels)

    def _place(self, number: int) -> np.ndarray:
        width, height = int(self._widths[number]), int(self._heights[number])
        end = int(self._ends[number])
        return self._content[end - 3 * width * height : end].reshape(height, width, 3)


class CachedImages:
    """The images of `images` (hvd_lb.data.images.Images), decoded; the first of them is number `first` of `pixels`."""

    encoded = False

    def __init__(self, images: Images, pixels: SharedPixels, first: int) -> None:
        self._images, self._pixels, self._first = images, pixels, first
        self.classes, self.labels = images.classes, images.labels
        self.widths, self.heights = images.widths, images.heights

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, image_id: int) -> str:
        return self._images.name(image_id)

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        return self._images.evidence(start, stop)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        """BadImage, a UserError, for the first that cannot be decoded."""
        return [self.decoded(int(image_id)) for image_id in ids]

    def decoded(self, image_id: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """uint8 (height, width, 3). BadImage, which is not kept, each time; UserError as `decode_image`."""
        number = self._first + image_id
        with self._pixels.alone(number):
            found = self._pixels.get(number)
            content = (
                np.empty(0, np.uint8) if found is not None else self._images.read(np.array([image_id]))[0]
            )
            check_header(self._images, image_id, content, max_pixels)
            if found is None:
                found = decode_image(self._images, image_id, content)
                self._pixels.put(number, found)
            return found


def check_cache(kind: CacheKind, dataset: Dataset) -> None:
    """UserError where a cache is asked for of images that are not files."""
    if kind != "none" and not dataset.train.encoded:
        raise UserError(
            f"--cache {kind}: the images of {dataset.name} need no decoding; leave the option out"
        )


def shared(
    dataset: Dataset,
    kind: CacheKind,
    loader: LoaderKind,
    device: str,
    run: str | int,
    barrier: Callable[[], None] = lambda: None,
) -> Dataset:
    """`dataset`, decoded once for all processes of `run` where `kind` says so. UserError where it cannot be.

    Collective on these processes, which have a `barrier`. Others, which come and go, have for `run` the descriptor of a
    file in memory that outlives each of them, empty at first.
    """
    check_cache(kind, dataset)
    if kind == "none":
        return dataset
    if loader == "dali" and device == "cuda":
        raise UserError(
            f"--cache {kind}: on GPUs DALI decodes JPEG to other pixels than would be in the cache; "
            "give --loader torchvision, or leave the option out"
        )
    opened, file = cached(dataset, kind, run)
    barrier()
    if kind == "memory" and isinstance(run, str):
        file.unlink()
    return opened


def cached(dataset: Dataset, kind: Literal["memory", "disk"], run: str | int) -> tuple[Dataset, SharedFile]:
    """`dataset` with all images decoded at most once by the processes of this host, and the file they share.

    With "memory" it is that of the processes of `run`, and may be unlinked when all of them have come here, or is that
    of the descriptor `run`. UserError where it does not fit.
    """
    train, val = dataset.train, dataset.val
    if kind == "disk":
        path = _on_disk(dataset)
        discard_unused(path.parent, _PATTERN, but=path)
    else:
        discard_unused(MEMORY, _PATTERN)
        name = f"hvd-lb-{_digest(str(os.getuid()), str(run))}.pixels"
        path = Path(f"/proc/self/fd/{run}") if isinstance(run, int) else MEMORY / name
    pixels = SharedPixels(
        path, np.concatenate([train.widths, val.widths]), np.concatenate([train.heights, val.heights])
    )
    parts = CachedImages(train, pixels, 0), CachedImages(val, pixels, len(train))
    return Dataset(dataset.name, *parts, notes=dataset.notes), pixels.file


def _on_disk(dataset: Dataset) -> Path:
    """Of this index and what decodes, in a folder for the path of the data, where all others are of no more use."""
    if not isinstance(dataset, IndexedDataset) or not dataset.train.index.identity:
        raise UserError(f"--cache disk: the index of {dataset.name} could not be kept; use --cache memory")
    parts = (dataset.train.index, dataset.val.index)
    root = parts[0].root
    place = str(root.resolve() if isinstance(root, Path) else root)
    folder = cache_folder() / "decoded" / _digest(place)
    return folder / f"hvd-lb-{_digest(*(index.identity for index in parts), *_decoders())}.pixels"


def _decoders() -> list[str]:
    """What pixels depend on besides the files."""
    libraries = [f"{name} {features.version(name)}" for name in _LIBRARIES]
    return [*libraries, *map(inspect.getsource, (decode, essential))]


def _digest(*names: str) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


def _mark(pixels: np.ndarray) -> int:
    return _SET | zlib.crc32(np.ascontiguousarray(pixels).data)
