"""A data set of one's own: train/ and val/ with class folders, or one folder of class folders to divide."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from hvd_lb.data.images import Dataset, OnBadImage, Progress
from hvd_lb.data.index import Index, open_index
from hvd_lb.data.listing import class_folders
from hvd_lb.data.reading import retried
from hvd_lb.errors import UserError

_NAMED = 3  # how many classes a message names


class FolderImages:
    """The images of an index, or those at the positions `members` (int64, ascending)."""

    encoded = True

    def __init__(self, index: Index, members: np.ndarray | None = None) -> None:
        chosen = slice(None) if members is None else members
        self._index = index
        self._members = members
        self.classes = index.classes
        self.labels = index.labels[chosen]
        self.widths = index.widths[chosen]
        self.heights = index.heights[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        paths = (self.name(int(image_id)) for image_id in ids)
        return [retried(partial(np.fromfile, path, np.uint8), path) for path in paths]

    def name(self, image_id: int) -> str:
        return self._index.path(image_id if self._members is None else int(self._members[image_id]))


def open_folder(
    folder: Path,
    *,
    val_fraction: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_bad_image: OnBadImage = "fail",
) -> Dataset:
    """Of train/ and val/ in `folder`, or, with `val_fraction`, of train/ or the class folders in it alone."""
    inside = class_folders(folder)
    name = folder.resolve().name
    if val_fraction is None:
        if not any(folder.iterdir()):
            raise UserError(
                f"{folder}: is empty; expected train/ and val/ with a folder of images for each class"
            )
        if "train" not in inside or "val" not in inside:
            missing = "val" if "train" in inside or "val" not in inside else "train"
            raise UserError(
                f"{folder}: has no {missing}/; expected train/ and val/, or give --val-fraction 0.1 to "
                "hold out a tenth of one folder of class folders"
            )
        _same_classes(folder)
        train, val = (
            _nonempty_index(folder / split, on_progress, on_bad_image) for split in ("train", "val")
        )
        _every_class_trained(train, train.labels)
        return Dataset(name, FolderImages(train), FolderImages(val))
    if "val" in inside:
        raise UserError(
            f"--val-fraction {val_fraction}: {folder} has a val/ of its own; leave the option out"
        )
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: expected a number between 0 and 1")
    root = folder / "train" if "train" in inside else folder
    index = _nonempty_index(root, on_progress, on_bad_image)
    held_out = hold_out(index, val_fraction, seed)
    if not held_out.any():
        raise UserError(
            f"{index.root}: no class has two images, so none can be held out; give a folder with val/"
        )
    _every_class_trained(index, index.labels[~held_out])
    return Dataset(
        name, FolderImages(index, np.flatnonzero(~held_out)), FolderImages(index, np.flatnonzero(held_out))
    )


def hold_out(index: Index, fraction: float, seed: int) -> np.ndarray:
    """bool (N,): which images validate. Those whose keyed hash of the relative path falls below `fraction`.

    So a file added to the folder moves no other. A class of two images or more always has one on either side.
    """
    key = seed.to_bytes(8, "little", signed=True)
    digests = (
        hashlib.blake2b(index.relative(i), digest_size=8, key=key).digest() for i in range(len(index.labels))
    )
    hashes = np.frombuffer(b"".join(digests), "<u8")
    held_out = hashes < np.uint64(fraction * 2.0**64)
    for label in range(len(index.classes)):
        members = np.flatnonzero(index.labels == label)
        if len(members) < 2:
            held_out[members] = False
        elif held_out[members].all():
            held_out[members[np.argmax(hashes[members])]] = False
        elif not held_out[members].any():
            held_out[members[np.argmin(hashes[members])]] = True
    return held_out


def _nonempty_index(root: Path, on_progress: Progress | None, on_bad_image: OnBadImage) -> Index:
    index = open_index(root, on_progress, on_bad_image)
    if not len(index.labels):
        raise UserError(f"{root}: holds no images; expected a folder of images for each class")
    return index


def _every_class_trained(index: Index, labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(index.classes))
    if not counts.all():
        empty = [index.classes[label] for label in np.flatnonzero(counts == 0)]
        raise UserError(
            f"{index.root}: no images to train on in {_some(empty)}; fill or remove these classes"
        )


def _same_classes(folder: Path) -> None:
    train, val = (set(class_folders(folder / split)) for split in ("train", "val"))
    if train != val:
        parts = [
            f"only in {split}: {_some(sorted(names))}"
            for split, names in (("train", train - val), ("val", val - train))
            if names
        ]
        raise UserError(
            f"{folder}: train/ and val/ have different classes ({'; '.join(parts)}); they must be the same"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
