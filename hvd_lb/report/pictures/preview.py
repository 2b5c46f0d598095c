"""What a recipe makes of a data set, as a picture: images with their windows, and beside them the loader's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image, ImageDraw

from hvd_lb.report.pictures.drawing import EDGE, INK, PALE, PAPER, Box, Colour, magnified, write
from hvd_lb.report.pictures.views import CropView, View

# Okabe and Ito's: told apart also by those who see fewer colours.
COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
_CENTRE: Colour = (213, 94, 0)

_SIDE, _ORIGINAL = 224, (336, 224)
_GAP, _FRAME, _CAPTION, _HEAD = 20, 4, 40, 44
_STEEPEST = 3.0
_ROW = _SIDE + _CAPTION + _GAP
_PAIR = _ORIGINAL[0] + _SIDE + 2 * _GAP


@dataclass(frozen=True)
class _Sheet:
    picture: Image.Image
    draw: ImageDraw.ImageDraw


def preview(training: list[View], evaluation: list[View], title: str, subtitle: str) -> Image.Image:
    """`training` views, at most six epochs each, a row each; `evaluation` views side by side below them."""
    epochs = max((len(view.crops) for view in training), default=0)
    pairs = max(1, (_ORIGINAL[0] + epochs * (_SIDE + _GAP)) // (_PAIR - _GAP))
    width = _GAP + max(_ORIGINAL[0] + _GAP + epochs * (_SIDE + _GAP), pairs * _PAIR)
    lines = -(-len(evaluation) // pairs)
    top = 74
    height = top + 2 * _HEAD + (len(training) + lines) * _ROW
    picture = Image.new("RGB", (width, height), PAPER)
    sheet = _Sheet(picture, ImageDraw.Draw(picture))
    write(sheet.draw, (_GAP, 16), title, width - 2 * _GAP, size=19)
    write(sheet.draw, (_GAP, 44), subtitle, width - 2 * _GAP, size=13, fill=PALE)
    y = top
    _heading(sheet, y, f"Training: the first {epochs} epochs")
    y += _HEAD
    for view in training:
        _original(sheet, (_GAP, y), view, COLOURS)
        for epoch, crop in enumerate(view.crops):
            x = _GAP + _ORIGINAL[0] + _GAP + epoch * (_SIDE + _GAP)
            _tensor(sheet, (x, y), crop, f"epoch {epoch}", COLOURS[epoch])
        y += _ROW
    _heading(sheet, y, "Evaluation")
    y += _HEAD
    for place, view in enumerate(evaluation):
        line, column = divmod(place, pairs)
        at = _GAP + column * _PAIR, y + line * _ROW
        _original(sheet, at, view, (_CENTRE,))
        _tensor(sheet, (at[0] + _ORIGINAL[0] + _GAP, at[1]), view.crops[0], "evaluation", _CENTRE)
    return picture


def _heading(sheet: _Sheet, y: int, text: str) -> None:
    sheet.draw.line((_GAP, y, sheet.picture.width - _GAP, y), EDGE)
    write(sheet.draw, (_GAP, y + 8), text, sheet.picture.width, size=15)


def _original(sheet: _Sheet, at: Box, view: View, colours: tuple[Colour, ...]) -> None:
    """The image as stored, its windows on it; where they coincide, the later one lies thinner on the earlier one."""
    shown = magnified(view.original, _ORIGINAL, _STEEPEST)
    height, width = view.original.shape[:2]
    left, top = at[0], at[1] + (_ORIGINAL[1] - shown.height) // 2
    sheet.picture.paste(shown, (left, top))
    across, down = shown.width / width, shown.height / height
    for edge, inked in (
        (1, True),
        (0, False),
    ):  # all outlines first, or they would hide windows that coincide
        for number, (crop, colour) in enumerate(zip(view.crops, colours, strict=False)):
            x, y, w, h = crop.window
            half = len(view.crops) - number + 1 + edge
            corners = (
                (round(left + x * across) - half, round(top + y * down) - half),
                (round(left + (x + w) * across) + half - 1, round(top + (y + h) * down) + half - 1),
            )
            sheet.draw.rectangle(corners, outline=INK if inked else colour, width=2 * half)
    squeezed = abs(across / down - 1) > 0.05
    below = f"{width:,} × {height:,} pixels" + (", shown squeezed" if squeezed else "")
    _caption(sheet, at, _ORIGINAL[0], view.label, f"{below}, {PurePath(view.name).name}")


def _tensor(sheet: _Sheet, at: Box, crop: CropView, name: str, colour: Colour) -> None:
    shown = magnified(crop.pixels, (_SIDE, _SIDE))
    left, top = at[0] + (_SIDE - shown.width) // 2, at[1] + (_SIDE - shown.height) // 2
    sheet.draw.rectangle(
        (
            left - _FRAME,
            top - _FRAME,
            left + shown.width + _FRAME - 1,
            top + shown.height + _FRAME - 1,
        ),
        fill=colour,
    )
    sheet.picture.paste(shown, (left, top))
    x, y, width, height = crop.window
    first = name + ("   ⇄ mirrored" if crop.flip else "")
    _caption(sheet, at, _SIDE, first, f"{width:,} × {height:,} from ({x:,}, {y:,})")


def _caption(sheet: _Sheet, at: Box, width: int, first: str, second: str) -> None:
    below = at[1] + _SIDE + 8
    write(sheet.draw, (at[0], below), first, width, size=13)
    write(sheet.draw, (at[0], below + 18), second, width, size=11, fill=PALE)
