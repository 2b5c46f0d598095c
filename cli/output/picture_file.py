"""Where a command's picture goes: a PNG file that is there as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from hvd_lb.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


class _Picture(click.Path):
    """A file to be written, in a folder that is there, with a name that ends in .png."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() != ".png":
            self.fail(f"{str(path)!r} does not end in .png", param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"{str(path.parent)!r} is no folder", param, ctx)
        return path


PICTURE = _Picture(dir_okay=False, path_type=Path)


def write_picture(picture: Image.Image, path: Path) -> None:
    """As PNG; says so."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        picture.save(temporary, "PNG", optimize=True)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    click.echo(f"{path}: {picture.width} × {picture.height} pixels")
