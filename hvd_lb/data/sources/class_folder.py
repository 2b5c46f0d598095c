"""What a class folder holds: its images at any depth, and where its links lead.

A link may lead to images that lie elsewhere. One that leads into another class, into another split, or to a folder
that holds any of these, would bring images in that are something else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from hvd_lb.data.files.kinds import EXTENSIONS, is_ignored
from hvd_lb.data.files.rows import Names
from hvd_lb.data.sources.source import FileState, States, file_state, state_of
from hvd_lb.errors import UserError


@dataclass(frozen=True)
class Folder:
    """`relative` to the root; the number of images, their sorted names, relative to the root, and states.

    `strangers` are no images, `ignored` are hidden or made by systems.
    """

    label: str
    relative: str
    state: FileState
    images: int
    names: Names
    states: States
    strangers: list[str]
    ignored: list[str]


@dataclass(frozen=True)
class ClassFolder:
    """The folder `label` in `root`; `others` are the folders of other splits. Real paths are without links."""

    root: Path
    label: str
    others: tuple[str, ...] = ()
    _real: dict[str, str] = field(default_factory=dict, compare=False)
    """Of the root and the folders that links to files lead to: for each link it would take some looks at the files."""

    def folders(self) -> list[Folder]:
        """It and all folders below, by their path. UserError for what cannot be listed and for links that mislead."""
        own = os.path.realpath(self.root / self.label)
        if os.path.islink(self.root / self.label):
            self._refuse_misleading(self.label, own, os.path.realpath(self.root))
            self._refuse_other_class(self.label, own)
        return sorted(self._walk(self.label, own, own, frozenset()), key=lambda folder: folder.relative)

    def _walk(self, relative: str, real: str, own: str, above: frozenset[str]) -> Iterator[Folder]:
        try:
            state = file_state(self.root, relative)
            folders, images, strangers, ignored = [], [], [], []
            with os.scandir(self.root / relative) as entries:
                for entry in entries:
                    path = f"{relative}/{entry.name}"
                    if is_ignored(entry.name):
                        ignored.append(path)
                    elif entry.is_dir():
                        folders.append((path, entry.is_symlink()))
                    elif entry.name.lower().endswith(EXTENSIONS):
                        stat = entry.stat()
                        if not S_ISREG(stat.st_mode):
                            raise UserError(
                                f"{self.root / path}: is no file, though it is called like an image"
                            )
                        if entry.is_symlink():
                            target = self._target(entry.path, real)
                            self._refuse_other_split(path, target)
                            if not _within(target, own):
                                self._refuse_other_class(path, target)
                        images.append((entry.name, state_of(stat)))
                    else:
                        strangers.append(path)
            images.sort()
            names = Names.of(os.fsencode(f"{relative}/{name}") for name, _ in images)
            states = States()
            for _, of_image in images:
                states.add(of_image)
            yield Folder(
                self.label, relative, state, len(images), names, states, sorted(strangers), sorted(ignored)
            )
            for path, linked in folders:
                inside = os.path.realpath(self.root / path) if linked else f"{real}/{os.path.basename(path)}"
                if linked:
                    if _within(inside, own) or inside in above:  # its images are listed already
                        continue
                    self._refuse_misleading(path, inside, real)
                    self._refuse_other_class(path, inside)
                yield from self._walk(path, inside, own, above | {real})
        except OSError as error:
            where = error.filename or self.root / relative
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error

    def _target(self, path: str, real: str) -> str:
        """Where a link to a file leads, in a folder that is really `real`; a link that it leads to is not followed."""
        folder, name = os.path.split(os.path.join(real, os.readlink(path)))
        return os.path.join(self._resolved(folder), name)

    def _resolved(self, folder: str) -> str:
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return self._real[folder]

    def _refuse_misleading(self, path: str, target: str, real: str) -> None:
        """UserError for a link, in a folder that is really `real`, to a folder that holds more than one class."""
        root = os.path.realpath(self.root)
        if any(_within(place, target) for place in (real, root)):
            raise UserError(
                f"{self.root / path}: leads to a folder above it, and so to other classes; remove the link"
            )
        self._refuse_other_split(path, target)

    def _refuse_other_class(self, path: str, target: str) -> None:
        """A class may be a link into the root only where that leads to no class, but to a hidden folder."""
        root = self._resolved(os.fspath(self.root))
        if _within(target, root) and not is_ignored(os.path.relpath(target, root).split("/")[0]):
            raise UserError(f"{self.root / path}: leads into another class; remove the link")

    def _refuse_other_split(self, path: str, target: str) -> None:
        for other in self.others:
            if _within(target, other) or _within(other, target):
                raise UserError(
                    f"{self.root / path}: leads to images of {os.path.basename(other)}/, so that the same would train "
                    "and validate; remove the link"
                )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
