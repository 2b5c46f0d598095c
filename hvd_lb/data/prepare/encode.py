"""Images as files, for writing a data set to another place: the bytes they have, or new ones.

A file is copied byte for byte, unless it is to be made smaller. Pixels become PNG, which loses nothing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from hvd_lb.data.decoding.decode import BadImage, decode_image
from hvd_lb.data.files.threads import InOrder
from hvd_lb.data.images import Images

_QUALITIES = range(1, 101)
_AHEAD = 4  # images a thread, and more while all that is ahead is small
_MOST_AHEAD, _AHEAD_BYTES = 1024, 64 << 20


@dataclass(frozen=True)
class EncodedImage:
    """An image file: its bytes, its ending in lower case with the dot, and whether it would not decode."""

    content: bytes
    ending: str
    undecodable: bool = False


@dataclass(frozen=True)
class Encoding:
    """Images with a side longer than `max_side` pixels are shrunk to it, by Lanczos, and become JPEG of `quality`.

    None leaves all as they are. ValueError for impossible numbers.
    """

    max_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side {self.max_side}: expected at least 1 pixel")
        if self.quality not in _QUALITIES:
            raise ValueError(f"quality {self.quality}: expected 1 to 100")

    def parameters(self) -> dict[str, Any]:
        """What the bytes depend on, as JSON values."""
        return asdict(self) if self.max_side is not None else {"max_side": None}

    def __call__(self, images: Images, image_id: int) -> EncodedImage:
        """The file of one image. UserError for what cannot be read; what cannot be decoded is kept as it is."""
        (data,) = images.read(np.array([image_id]))
        too_large = self.max_side is not None and self.max_side < max(
            images.widths[image_id], images.heights[image_id]
        )
        if images.encoded:
            kept = EncodedImage(data.tobytes(), os.path.splitext(images.name(image_id))[1].lower())
            if not too_large:
                return kept
            try:
                data = decode_image(images, image_id, data)
            except BadImage:
                return EncodedImage(kept.content, kept.ending, undecodable=True)
        if too_large:
            return EncodedImage(self._shrunk(data), ".jpg")
        return EncodedImage(_png(data), ".png")

    def _shrunk(self, pixels: np.ndarray) -> bytes:
        height, width = pixels.shape[:2]
        scale = (self.max_side or 0) / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        file = io.BytesIO()
        Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(
            file, "JPEG", quality=self.quality
        )
        return file.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    """Of uint8 (height, width, 3); as grey, a third of the size, where the three are the same."""
    grey = (pixels[..., :1] == pixels).all()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels).save(file, "PNG")
    return file.getvalue()


def encoded_in_order(images: Images, first: int, encoding: Encoding, threads: int) -> Generator[EncodedImage]:
    """The files of all images from `first` on, read and encoded ahead of the consumer by `threads` threads, or more
    where they wait for a file system.
    """
    work: InOrder[int, EncodedImage] = InOrder(
        lambda ids: (encoding(images, image_id) for image_id in ids),
        range(first, len(images)),
        "hvd-lb encode",
        start=threads,
        room=lambda ahead, held: ahead < _AHEAD * threads or (ahead < _MOST_AHEAD and held < _AHEAD_BYTES),
        weigh=lambda image: len(image.content),
    )
    try:
        yield from work
    finally:
        work.close()
