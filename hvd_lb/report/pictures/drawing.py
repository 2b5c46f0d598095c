"""Pictures of images with words below them: what the contact sheet and the preview of a recipe are made of."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hvd_lb.data.decoding.decode import BadImage, decode_image
from hvd_lb.data.images import Images

INK, PALE, PAPER, EDGE = (20, 20, 20), (110, 110, 110), (255, 255, 255), (205, 205, 205)

Box = tuple[int, int]
Colour = tuple[int, int, int]


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The one that matplotlib brings along: the same picture on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def shortened(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a text, on one line, as fits into so many pixels."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def magnified(pixels: np.ndarray, box: Box, steepest: float | None = None) -> Image.Image:
    """uint8 (h, w, 3) as large as fits into `box`: small ones a whole number of times, so that pixels are squares.

    `steepest` bounds the ratio of the sides of what is shown: what is longer is squeezed.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    if steepest is not None and max(width, height) > steepest * min(width, height):
        long, short = (box[0], round(box[0] / steepest)), (round(box[1] / steepest), box[1])
        return image.resize(long if width > height else short, Image.Resampling.LANCZOS)
    scale = min(box[0] / width, box[1] / height)
    if scale >= 1:
        return image.resize((width * int(scale), height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def decoded(images: Images, image_id: int) -> np.ndarray:
    """uint8 (height, width, 3). BadImage, UserError."""
    (data,) = images.read(np.array([image_id]))
    return decode_image(images, image_id, data) if images.encoded else data


def decoded_or_reason(images: Images, image_id: int) -> np.ndarray | str:
    try:
        return decoded(images, image_id)
    except BadImage as error:
        return error.reason


def write(
    draw: ImageDraw.ImageDraw, at: Box, text: str, width: int, size: int = 12, fill: Colour = INK
) -> None:
    """One line of at most so many pixels, its top left corner at `at`."""
    draw.text(at, shortened(text, font(size), width), fill, font(size))
