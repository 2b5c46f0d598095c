"""Images as files, for writing a data set to another place: the bytes they have, or new ones.

A file is copied byte for byte, unless it is to be made smaller. Pixels become PNG, which loses nothing.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from hvd_lb.data.decoding.decode import BadImage, decode_image
from hvd_lb.data.images import Images

_QUALITIES = range(1, 101)
_AHEAD = 4


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
    """The files of all images from `first` on; `threads` threads read and encode some ahead of the consumer."""
    pool = ThreadPoolExecutor(threads, "hvd-lb encode")
    ahead: deque[Future[EncodedImage]] = deque()
    try:
        for image_id in range(first, len(images)):
            ahead.append(pool.submit(encoding, images, image_id))
            if len(ahead) > _AHEAD * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
