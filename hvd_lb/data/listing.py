"""The image files of a folder of class folders, in the order of torchvision's ImageFolder.

Classes are the sorted names of the folders; hidden names (leading dot) are ignored everywhere, files beside
the class folders too. Every other file inside a class folder, at any depth, has to be an image, told by its
extension; links are followed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvd_lb.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Listing:
    """Relative paths (bytes, as the file system has them), labels, and a stamp that changes with any file."""

    root: Path
    classes: list[str]
    names: list[bytes]
    labels: np.ndarray
    stamp: str


def class_folders(root: Path) -> list[str]:
    """Sorted names of the folders in `root`. UserError when it is missing or no folder."""
    if not root.exists():
        raise UserError(f"{root}: no such folder")
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of images, not a file")
    try:
        return sorted(
            entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror})") from error


def list_images(root: Path) -> Listing:
    """Every image below `root`. UserError for a file in a class folder that is none."""
    classes = class_folders(root)
    stamp = hashlib.sha256()
    names: list[bytes] = []
    labels: list[int] = []
    strangers: list[str] = []
    for label, name in enumerate(classes):
        stamp.update(b"\0" + os.fsencode(name) + b"\0")
        for folder, file, stat in sorted(_walk(root / name, name, frozenset()), key=lambda found: found[:2]):
            path = f"{folder}/{file}"
            if not file.lower().endswith(EXTENSIONS):
                strangers.append(path)
                continue
            names.append(os.fsencode(path))
            labels.append(label)
            stamp.update(b"%s\0%d\0%d\0" % (names[-1], stat.st_size, stat.st_mtime_ns))
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise UserError(
            f"{root / strangers[0]}{more}: no image file ({' '.join(EXTENSIONS)}); "
            "move what is no image out of the class folders"
        )
    return Listing(root, classes, names, np.array(labels, np.int64), stamp.hexdigest()[:32])


def _walk(
    folder: Path, relative: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, str, os.stat_result]]:
    """(relative folder, file name, stat) of all that is below, in any order; no link upwards is followed."""
    try:
        here = folder.stat()
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            return
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{relative}/{entry.name}", above | {identity})
            else:
                yield relative, entry.name, entry.stat()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
