"""A source of images: a folder of class folders.

Listing looks at names, sizes and times only. Folders are listed in the order of torchvision's ImageFolder: classes are
the sorted names of the folders; hidden names (leading dot) are ignored everywhere, files beside the class folders too.
Every other file inside a class folder, at any depth, has to be an image, told by its extension; links are followed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hvd_lb.data.files.kinds import EXTENSIONS, GIF
from hvd_lb.data.files.rows import measure_files
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.sources.source import FileState, Listing, file_state
from hvd_lb.errors import UserError


class NoImages(UserError):
    """The files at `paths` lie where only images should."""

    def __init__(self, message: str, paths: list[str]) -> None:
        super().__init__(message)
        self.paths = paths


@dataclass(frozen=True)
class FolderSource:
    """A folder of class folders."""

    root: Path
    home: Path
    name: str
    cheap: int = 20_000

    def with_classes(self, classes: list[str]) -> FolderSource:
        """Its own folders say what its classes are."""
        return self

    def listing(self) -> Listing:
        _check_folder(self.root)
        before = file_state(self.root, ".")  # before its contents, so that no change falls between
        classes = class_folders(self.root)
        found = [of for each in in_threads(partial(_list_class, self.root), classes) for of in each]
        strangers = [path for folder in found for path in folder.strangers]
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            kind = GIF if strangers[0].lower().endswith(".gif") else "no image file"
            raise NoImages(
                f"{self.root / strangers[0]}{more}: {kind} ({' '.join(EXTENSIONS)}); "
                "move what is no image out of the class folders",
                [str(self.root / path) for path in strangers],
            )
        stamp = hashlib.sha256()
        names: list[bytes] = []
        counts = np.zeros(len(classes), np.int64)
        position = dict(zip(classes, range(len(classes)), strict=True))
        for class_name in classes:
            stamp.update(b"\0" + os.fsencode(class_name) + b"\0")
        for folder in found:
            for name, size, changed in folder.images:
                names.append(name)
                stamp.update(b"%s\0%d\0%d\0" % (name, size, changed))
            counts[position[folder.label]] += len(folder.images)
        labels = np.repeat(np.arange(len(classes)), counts)
        watched = [before, *(folder.state for folder in found)]
        return Listing(
            stamp.hexdigest()[:32],
            watched,
            lambda report, journal: measure_files(self.root, classes, names, labels, report, journal),
        )


@dataclass(frozen=True)
class _Folder:
    """Its images as (name relative to the root, size, time of change), sorted; `strangers` are no images."""

    label: str
    state: FileState
    images: list[tuple[bytes, int, int]]
    strangers: list[str]


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise UserError(f"{root}: no such folder")
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of images, not a file")


def class_folders(root: Path) -> list[str]:
    """Sorted names of the folders in `root`. UserError when it is missing or no folder."""
    _check_folder(root)
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror})") from error


def _list_class(root: Path, name: str) -> list[_Folder]:
    folders = sorted(_walk(root, name, name, frozenset()), key=lambda found: found[0])
    return [folder for _, folder in folders]


def _walk(
    root: Path, relative: str, label: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, _Folder]]:
    """(relative path, what it holds) of a folder and all below, in any order; no link upwards is followed."""
    try:
        own = file_state(root, relative)
        here = os.stat(root / relative)
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            return
        folders, images, strangers = [], [], []
        with os.scandir(root / relative) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    stat = entry.stat()
                    images.append((entry.name, stat.st_size, stat.st_mtime_ns))
                else:
                    strangers.append(f"{relative}/{entry.name}")
        named = [(os.fsencode(f"{relative}/{name}"), size, changed) for name, size, changed in sorted(images)]
        yield relative, _Folder(label, own, named, sorted(strangers))
        for name in folders:
            yield from _walk(root, f"{relative}/{name}", label, above | {identity})
    except OSError as error:
        raise UserError(f"{error.filename or root / relative}: cannot be read ({error.strerror})") from error
