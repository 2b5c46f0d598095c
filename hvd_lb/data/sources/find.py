"""What a path named by `--data` is: class folders, lists or shards, with or without a validation split."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.data.sources.folders import FolderSource, class_folders
from hvd_lb.data.sources.lists import SUFFIXES, ListSource
from hvd_lb.data.sources.shards import (
    COMPRESSED,
    divided,
    is_pattern,
    named_shards,
    refused_compressed,
    shards_in,
    sibling,
)
from hvd_lb.data.sources.source import Source
from hvd_lb.errors import UserError

_NAMED = 3  # how many classes a message names
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/|pipe:", re.IGNORECASE)


@dataclass(frozen=True)
class Sources:
    """The splits of a data set. `no_val` says what a user can do where there is none.

    `agree` looks, before any image is opened, whether both have the same classes.
    """

    name: str
    train: Source
    val: Source | None
    no_val: str
    agree: Callable[[], None] = lambda: None


def refuse_remote(spec: str) -> None:
    """UserError for what is an address, or a command whose output WebDataset would read."""
    found = _REMOTE.match(spec)
    if found is None or os.path.lexists(spec):
        return
    if spec.startswith("file:"):
        raise UserError(
            f"{spec}: expected a path, not an address; give {spec.removeprefix('file:').removeprefix('//')}"
        )
    raise UserError(
        f"{spec}: is read from no server; copy it to a disk or a shared file system (aws s3 sync, gcloud storage "
        "rsync, wget, rclone), or mount it (Mountpoint for S3, gcsfuse, rclone mount), and give that path"
    )


def folder_of(spec: str) -> Path:
    """The folder that has all of the data in it, whether they are there or not."""
    path = Path(spec).expanduser()
    if is_pattern(spec):
        return divided(spec)[0]
    return path.parent if path.suffix.lower() in SUFFIXES and not path.is_dir() else path


def find_sources(spec: str) -> Sources:
    """UserError for what is none, or has one split only where that cannot be meant."""
    refuse_remote(spec)
    path = Path(spec).expanduser()
    if spec.endswith(COMPRESSED) and not path.is_dir():
        raise refused_compressed(spec)
    if is_pattern(spec):
        shards = named_shards(spec)
        no_val = f"{spec}: no validation shards beside it (val instead of train in the name)"
        return Sources(shards.root.resolve().name, shards, sibling(shards), no_val)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return _lists(path.parent, path)
    if path.is_file():
        raise UserError(
            f"{path}: expected a folder of images, a list (.csv, .tsv) or shards (.tar), not a file of another kind"
        )
    inside = class_folders(path)
    if "train" in inside or "val" in inside:
        return _folders(path, inside)
    if lists := [path / f"train{suffix}" for suffix in SUFFIXES if (path / f"train{suffix}").is_file()]:
        return _lists(path, lists[0])
    shards_by_split = shards_in(path)
    if train := shards_by_split.get("train"):
        return Sources(path.resolve().name, train, shards_by_split.get("val"), f"{path}: has no val-….tar")
    if shards_by_split:
        raise UserError(f"{path}: has shards val-….tar, but no train-….tar")
    if not any(entry for entry in path.iterdir()):
        raise UserError(f"{path}: is empty; expected train/ and val/ with a folder of images for each class")
    return Sources(path.resolve().name, FolderSource(path, path, "all"), None, f"{path}: has no val/")


def _folders(path: Path, inside: list[str]) -> Sources:
    if "train" not in inside:
        raise UserError(
            f"{path}: has no train/; expected train/ and val/, or give --val-fraction 0.1 to hold out a tenth of one "
            "folder of class folders"
        )
    train, val = (FolderSource(path / split, path, split) for split in ("train", "val"))
    found = val if "val" in inside else None
    return Sources(path.resolve().name, train, found, f"{path}: has no val/", lambda: _same_classes(path))


def _lists(folder: Path, train: Path) -> Sources:
    if not train.is_file():
        raise UserError(f"{train}: no such file")
    name = train.name.replace("train", "val", 1)
    val = folder / name
    found = ListSource(val) if val != train and val.is_file() else None
    no_val = f"{train}: no {name if val != train else 'val.csv'} beside it"
    return Sources(folder.resolve().name, ListSource(train), found, no_val)


def _same_classes(folder: Path) -> None:
    train, val = (set(class_folders(folder / split)) for split in ("train", "val"))
    if train != val:
        parts = [
            f"only in {split}: {some(sorted(names))}"
            for split, names in (("train", train - val), ("val", val - train))
            if names
        ]
        raise UserError(
            f"{folder}: train/ and val/ have different classes ({'; '.join(parts)}); they must be the same"
        )


def some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
