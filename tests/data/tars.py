"""Tar shards for tests, by Python's tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from image_files import photo

Member = tuple[str, bytes]


def png(seed: int = 0, width: int = 20) -> bytes:
    file = io.BytesIO()
    photo(width, 30, seed).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Iterable[Member], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(keys: Iterable[str], label: bytes = b"1") -> list[Member]:
    """An image and a label for each key; the image's width is 20 + its number."""
    return [
        member
        for number, key in enumerate(keys)
        for member in ((f"{key}.png", png(number, 20 + number)), (f"{key}.cls", label))
    ]
