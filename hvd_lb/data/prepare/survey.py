"""What a data set is made of, in figures: classes, sizes, formats, bytes.

Labels are counted in full. Everything else is a matter of the whole split while that takes seconds, and of a random
sample beyond; each figure comes with the number of images it was taken from.
"""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hvd_lb.data.decoding.decode import FORMATS
from hvd_lb.data.decoding.essential import essential
from hvd_lb.data.files.header import read_header
from hvd_lb.data.files.section import Section
from hvd_lb.data.images import Images
from hvd_lb.errors import UserError

_CHUNK = 1 << 20
_SIZES = 1_000_000
_FILES = 1_000
SIDE_EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Bounds of the histogram of longer sides, in pixels, each the last of its class; the class after them is open."""


@dataclass(frozen=True)
class Range:
    """Minimum, median and maximum."""

    least: int
    median: int
    most: int


@dataclass(frozen=True)
class Survey:
    """Of one split. `per_class` is over all classes, the empty ones too.

    `sized` images gave widths, heights and `sides` (how many longer sides lie between two of SIDE_EDGES); `opened`
    ones formats, `mean_bytes` of a file and EXIF orientations (1: upright or not given). `pixels_only` where images are
    no files. `broken` of the sized have no readable header.
    """

    images: int
    classes: int
    per_class: Range
    sized: int
    broken: int
    width: Range
    height: Range
    sides: tuple[int, ...]
    opened: int
    formats: Counter[str]
    orientations: Counter[int]
    mean_bytes: float
    pixels_only: bool


def survey(images: Images, threads: int = 8) -> Survey:
    """UserError for a file that cannot be read."""
    counts = np.zeros(len(images.classes), np.int64)
    for start in range(0, len(images), _CHUNK):
        counts += np.bincount(images.labels[start : start + _CHUNK], minlength=len(counts))
    sized = sample(len(images), _SIZES)
    widths, heights = images.widths[sized], images.heights[sized]
    whole = widths > 0
    longer = np.maximum(widths[whole], heights[whole])
    sides = np.histogram(longer - 1, (*SIDE_EDGES, np.iinfo(np.int32).max))[0]
    opened = sample(len(images), _FILES)
    with ThreadPoolExecutor(threads, "hvd-lb survey") as pool:
        files = list(pool.map(lambda image_id: _look(images, int(image_id)), opened))
    return Survey(
        images=len(images),
        classes=len(images.classes),
        per_class=_range(counts),
        sized=len(sized),
        broken=int((~whole).sum()),
        width=_range(widths[whole]),
        height=_range(heights[whole]),
        sides=tuple(sides.tolist()),
        opened=len(opened),
        formats=Counter(kind for kind, _, _ in files),
        orientations=Counter(turn for _, turn, _ in files),
        mean_bytes=sum(size for _, _, size in files) / max(1, len(files)),
        pixels_only=not images.encoded,
    )


def sample(images: int, most: int, seed: int = 0) -> np.ndarray:
    """At most `most` numbers below `images`, ascending, int64: all of them, or a random choice of different ones."""
    if images <= most:
        return np.arange(images)
    rng = np.random.default_rng(seed)
    chosen = np.unique(rng.integers(images, size=2 * most))
    while len(chosen) < most:
        chosen = np.union1d(chosen, rng.integers(images, size=most))
    return np.sort(rng.choice(chosen, most, replace=False))


def _look(images: Images, image_id: int) -> tuple[str, int, int]:
    """Format and mode ("JPEG RGB"), EXIF orientation, bytes."""
    (data,) = images.read(np.array([image_id]))
    if not images.encoded:
        return "pixels", 1, data.nbytes
    try:
        turn = read_header(Section.of_bytes(data.data)).orientation
        with Image.open(io.BytesIO(essential(data.data)), formats=FORMATS) as image:
            return f"{image.format} {image.mode}", turn, data.nbytes
    except UserError:
        raise
    except Exception:  # what PIL raises for broken files is not limited to a few types
        return "unreadable", 1, data.nbytes


def _range(values: np.ndarray) -> Range:
    if not len(values):
        return Range(0, 0, 0)
    return Range(int(values.min()), int(np.median(values)), int(values.max()))
