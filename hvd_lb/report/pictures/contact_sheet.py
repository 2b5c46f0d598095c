"""A contact sheet: images of a split in a random order, with the names of their classes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from hvd_lb.data.images import Images
from hvd_lb.plan.shuffle import Permutation
from hvd_lb.report.pictures.drawing import EDGE, PALE, PAPER, decoded_or_reason, font, magnified, write

_SIDE, _GAP, _LINE, _TOP = 128, 12, 18, 40


def contact_sheet(
    images: Images, title: str, *, columns: int = 8, rows: int = 6, seed: int = 0
) -> Image.Image:
    """The first columns × rows images of the permutation of `seed`, fewer where there are not so many.

    Small images are shown a whole number of times their size. What cannot be decoded says so.
    """
    count = min(columns * rows, len(images))
    columns = min(columns, count)
    width = _GAP + columns * (_SIDE + _GAP)
    sheet = Image.new("RGB", (width, _TOP + -(-count // columns) * (_SIDE + _LINE + _GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (_GAP, 12), title, width - 2 * _GAP, size=15)
    for place, image_id in enumerate(Permutation(len(images), seed, 0).slice(0, count)):
        row, column = divmod(place, columns)
        x, y = _GAP + column * (_SIDE + _GAP), _TOP + row * (_SIDE + _LINE + _GAP)
        pixels = decoded_or_reason(images, int(image_id))
        draw.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE), outline=EDGE)
        if isinstance(pixels, np.ndarray):
            shown = magnified(pixels, (_SIDE, _SIDE))
            sheet.paste(shown, (x + (_SIDE - shown.width) // 2, y + (_SIDE - shown.height) // 2))
        else:
            draw.multiline_text((x + 6, y + 6), _wrapped(f"cannot be decoded: {pixels}"), PALE, font(11))
        write(draw, (x, y + _SIDE + 2), images.classes[int(images.labels[image_id])], _SIDE)
    return sheet


def _wrapped(text: str) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(11).getlength(longer) > _SIDE - 12:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:8])
