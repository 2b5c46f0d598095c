"""A source of images: a folder of class folders.

Listing looks at names, sizes and times only. Folders are listed in the order of torchvision's ImageFolder: classes are
the sorted names of the folders; hidden names (leading dot) and what systems leave (`is_ignored`) are ignored
everywhere, files beside the class folders too. Every other file inside a class folder, at any depth, has to be an
image, told by its extension.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import numpy as np

from hvd_lb.data.files.kinds import EXTENSIONS, is_ignored, why_not_read
from hvd_lb.data.files.rows import Names, measure_files
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.options import NAMED, UNFINISHED
from hvd_lb.data.sources.class_folder import ClassFolder, Folder
from hvd_lb.data.sources.names import look_alike, same_composed, some
from hvd_lb.data.sources.source import Listing, file_state, stamped
from hvd_lb.data.sources.splits import split_of
from hvd_lb.errors import UserError, nearest

_OURS = {".hvd-lb-index", UNFINISHED}

_NO_NAMES = Names.of(())


class NoImages(UserError):
    """The files at `paths` lie where only images should."""

    def __init__(self, message: str, paths: list[str]) -> None:
        super().__init__(message)
        self.paths = paths


@dataclass(frozen=True)
class FolderSource:
    """A folder of class folders. `others` are the folders of other splits, into which no link may lead.

    `classes` are those of the training split where this is the other one: it need not have a folder for each.
    """

    root: Path
    home: Path
    name: str
    cheap: int = 20_000
    classes: tuple[str, ...] | None = None
    others: tuple[Path, ...] = ()

    def with_classes(self, classes: list[str]) -> FolderSource:
        return replace(self, classes=tuple(classes))

    def fits(self, classes: list[str], shards: list[str]) -> bool:
        return self.classes in (None, tuple(classes))

    def listing(self) -> Listing:
        before = file_state(self.root, ".") if self.root.is_dir() else None  # before its contents are read
        inside = look_into(self.root)
        self._check_names(inside)
        classes = list(self.classes or inside.folders)
        real = os.path.realpath(self.root)
        others = tuple(other for other in map(os.path.realpath, self.others) if other != real)
        found: list[Folder] = []

        def parts() -> Iterator[Names]:
            for folders in in_threads(
                lambda name: ClassFolder(self.root, name, others).folders(), inside.folders
            ):
                for folder in folders:
                    found.append(replace(folder, names=_NO_NAMES))
                    yield folder.names

        names = Names.joined(parts())
        _refuse_strangers(self.root, found)
        _refuse_other_level(self.root, found)
        stamp = hashlib.sha256()
        for name in classes:
            stamp.update(b"\0" + os.fsencode(name) + b"\0")
        counts: dict[str, int] = dict.fromkeys(inside.folders, 0)
        for folder in found:
            counts[folder.label] += folder.images
        few = len(names) <= self.cheap
        stamp.update(stamped([names.content, names.ends]).encode())
        for folder in found:
            stamp.update(folder.states.digest(few))
        number = {name: position for position, name in enumerate(classes)}
        labels = np.repeat(np.array([number[name] for name in counts], np.int64), list(counts.values()))
        remarks = self._remarks(inside, found)
        watched = [*([before] if before else []), *(folder.state for folder in found)]
        return Listing(
            stamp.hexdigest()[:32],
            watched,
            lambda report, journal: replace(
                measure_files(self.root, classes, names, labels, report, journal), remarks=remarks
            ),
            remarks,
        )

    def _check_names(self, inside: Inside) -> None:
        """UserError for class folders that the training split has not, or that cannot be told from each other."""
        if inside.dead:
            link = self.root / inside.dead[0]
            raise UserError(
                f"{link}: leads to nothing ({os.readlink(link)}), so a class may be missing; bring back what it leads "
                "to, or remove the link"
            )
        if twins := same_composed(inside.folders):
            raise UserError(f"{self.root}: has two classes of one name{look_alike(twins[0], [twins[1]])}")
        if not inside.folders and inside.images:
            raise UserError(
                f"{self.root}: holds images ({inside.images[0]}), but no class folders; give the folder above it, "
                "sort them into a folder for each class, or name images and labels in a list (docs/data.md)"
            )
        if self.classes is None:
            return
        known = set(self.classes)
        if strangers := [name for name in inside.folders if name not in known]:
            hints = (look_alike(name, self.classes) for name in strangers)
            raise UserError(
                f"{self.root}: has classes that are not among the {len(known)} of the training images, such as "
                f"{self.classes[0]!r}: {some(strangers)}{next(filter(None, hints), '')}"
            )

    def _remarks(self, inside: Inside, found: Sequence[Folder]) -> list[str]:
        ignored = [
            *(of for of in inside.ignored if of not in _OURS),
            *(path for folder in found for path in folder.ignored),
        ]
        remarks = []
        if ignored:
            remarks.append(f"hidden or made by systems, and ignored: {len(ignored):,}, such as {ignored[0]}")
        if inside.images:
            remarks.append(
                f"images beside the class folders, which are not used: {len(inside.images):,}, such as "
                f"{inside.images[0]}"
            )
        if self.classes and (missing := sorted(set(self.classes) - set(inside.folders))):
            remarks.append(
                f"classes without a folder: {len(missing):,} of {len(self.classes):,} ({some(missing)})"
            )
        return [f"{self.root.name}: {remark}" for remark in remarks]


@dataclass(frozen=True)
class Inside:
    """Sorted names of what lies in a folder: folders, images, what is ignored (hidden or made by systems), and links
    without an extension that lead nowhere.
    """

    folders: list[str]
    images: list[str]
    ignored: list[str]
    dead: list[str]


def look_into(root: Path) -> Inside:
    """UserError when it is missing or no folder."""
    if not root.exists():
        meant = nearest(root.name.lower(), NAMED) if root.name == str(root) else ""
        raise UserError(f"{root}: no such folder{meant}")
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of images, not a file")
    folders, images, ignored, dead = [], [], [], []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    ignored.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry.name)
                elif entry.is_symlink() and "." not in entry.name and not os.path.exists(entry.path):
                    dead.append(entry.name)
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror})") from error
    return Inside(sorted(folders), sorted(images), sorted(ignored), sorted(dead))


def _refuse_strangers(root: Path, found: Sequence[Folder]) -> None:
    strangers = [path for folder in found for path in folder.strangers]
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        kind = why_not_read(strangers[0])
        raise NoImages(
            f"{root / strangers[0]}{more}: {kind} ({' '.join(EXTENSIONS)}); move what is no image out of the class "
            "folders, or, where that cannot be, name images and labels in a list (docs/data.md)",
            [str(root / path) for path in strangers],
        )


def _refuse_other_level(root: Path, found: Sequence[Folder]) -> None:
    """UserError for a class folder that divides into folders, which look like classes, above all of its images."""
    below: dict[str, list[str]] = {}
    for folder in found:
        if folder.images:
            below.setdefault(folder.label, []).append(folder.relative)
    for place, holding in below.items():
        while place not in holding:
            folders = list(dict.fromkeys(of[len(place) + 1 :].split("/")[0] for of in holding))
            splits = [name for name in folders if split_of(name)]
            if len(folders) > 1 or splits:
                _refuse_level(root, place, folders, bool(splits))
            place = f"{place}/{folders[0]}"


def _refuse_level(root: Path, place: str, folders: Sequence[str], splits: bool) -> None:
    inside = f"{root / place} holds no images, only folders ({some(folders)})"
    if splits:
        raise UserError(f"{inside}: these are no classes but splits; give --data {quote(str(root / place))}")
    raise UserError(
        f"{inside}: which are the classes? Give --data {quote(str(root / place))} if they are in there; else move them "
        f"to {root}, a folder for each class, or name images and labels in a list (docs/data.md)"
    )
