"""What a path named by `--data` or `--val` is: class folders, lists or shards, with or without a validation split."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from hvd_lb.data.remote import store
from hvd_lb.data.remote.address import Address, Place, is_address
from hvd_lb.data.sources.folders import FolderSource, Inside, look_into
from hvd_lb.data.sources.lists import SUFFIXES, ListSource
from hvd_lb.data.sources.places import MANIFEST
from hvd_lb.data.sources.shards import (
    COMPRESSED,
    ShardSource,
    divided,
    is_pattern,
    named_shards,
    refused_compressed,
    shards_in,
    sibling,
    tar_files,
)
from hvd_lb.data.sources.source import Source
from hvd_lb.data.sources.splits import Split, find_partners, find_splits, renamed, split_of
from hvd_lb.errors import UserError

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/|pipe:", re.IGNORECASE)
# Kaggle's download of ImageNet: images in one of these, classes of the validation images in a file further up.
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_KAGGLE_LABELS = "LOC_val_solution.csv"


@dataclass(frozen=True)
class Sources:
    """The splits of a data set. `no_val` says what is missing where there is no validation split.

    `notes` say what was taken as what, where that is not plain from its name.
    """

    name: str
    train: Source
    val: Source | None
    no_val: str
    notes: tuple[str, ...] = ()


def refuse_remote(spec: str) -> None:
    """UserError for an address of another kind than those that are read, or a command whose output WebDataset would
    read.
    """
    found = _REMOTE.match(spec)
    if found is None or os.path.lexists(spec) or is_address(spec):
        return
    if spec.startswith("file:"):
        raise UserError(
            f"{spec}: expected a path, not an address; give {spec.removeprefix('file:').removeprefix('//')}"
        )
    raise UserError(
        f"{spec}: is no address that is read (s3:// gs:// az:// https://); copy it to a disk or a shared file system, "
        "or mount it (rclone mount), and give that path"
    )


def folder_of(spec: str) -> Path:
    """The folder that has all of the data in it, whether they are there or not."""
    path = Path(spec).expanduser()
    if is_pattern(spec):
        root = divided(spec)[0]
        assert isinstance(root, Path)
        return root
    return path.parent if path.suffix.lower() in SUFFIXES and not path.is_dir() else path


def find_sources(spec: str, val: str | None = None) -> Sources:
    """Those of `--data spec`, with `--val val`. UserError for what is none, or has one split only where that cannot be
    meant.
    """
    try:
        return _sources(spec, val)
    except OSError as error:
        raise UserError(f"{error.filename or spec}: cannot be read ({error.strerror})") from error


def _sources(spec: str, val: str | None) -> Sources:
    if val is None:
        return _find(spec)
    images, found = _validation(val), _find(spec, alone=True)
    train = found.train
    if isinstance(train, FolderSource) and isinstance(images, FolderSource):
        _refuse_same(train.root, images.root)
        train, images = replace(train, others=(images.root,)), replace(images, others=(train.root,))
    elif isinstance(train, ListSource) and isinstance(images, ListSource):
        _refuse_same(train.path, images.path)
        images = replace(images, training=train)
    elif isinstance(train, FolderSource) and isinstance(images, ListSource):
        images = replace(images, training=train.root)
    elif isinstance(train, ListSource) and isinstance(images, FolderSource):
        train = replace(train, validation=images.root)
    elif isinstance(train, ShardSource) and isinstance(images, ShardSource):
        both = sorted(set(train.shards) & set(images.shards)) if train.root == images.root else []
        if both:
            raise UserError(
                f"{train.root / both[0]}: is named for training and for validation; leave it out of one of them"
            )
    return replace(found, train=train, val=images, notes=())


def _find(spec: str, alone: bool = False) -> Sources:
    """As `find_sources`; `alone`: the validation split comes from elsewhere."""
    refuse_remote(spec)
    if is_address(spec):
        return _at_a_server(spec, alone)
    path = Path(spec).expanduser()
    if spec.endswith(COMPRESSED) and not path.is_dir():
        raise refused_compressed(spec)
    if is_pattern(spec):
        shards = named_shards(spec)
        return Sources(
            str(_resolved(shards.root).name), shards, None if alone else sibling(shards), _no_sibling(spec)
        )
    if _is_list(path):
        return _lists(path.parent, path, alone)
    if path.is_file():
        raise UserError(
            f"{path}: expected a folder of images, a list (.csv, .tsv) or shards (.tar), not a file of another kind"
        )
    path = next((path / inner for inner in _KAGGLE if (path / inner / "train").is_dir()), path)
    inside = look_into(path)
    if splits := _split_folders(path, inside):
        return _folders(path, splits, alone)
    lists = [entry.name for entry in sorted(path.iterdir()) if _is_list(entry)]
    if lists := [name for name in lists if split_of(Path(name).stem) == "train"]:
        return _lists(path, path / lists[0], alone)
    if packed := _shards(path):
        return packed
    if not any(entry for entry in path.iterdir()):
        raise UserError(f"{path}: is empty; expected train/ and val/ with a folder of images for each class")
    if not inside.folders and (tars := tar_files(path)):
        raise UserError(
            f"{path}: has tar files, but none is called train-NUMBER.tar; name them, such as --data "
            f"{quote(str(path / tars[0]))}, and those of the validation images with --val"
        )
    return Sources(path.resolve().name, FolderSource(path, path, "all"), None, _no_val(path, inside))


def _at_a_server(spec: str, alone: bool) -> Sources:
    """Shards are what is read there: single files would be a request each."""
    address = Address.of(spec)
    if address.name.endswith(COMPRESSED):
        raise refused_compressed(str(address))
    if is_pattern(str(address)):
        shards = named_shards(spec)
        return Sources(
            shards.root.name, shards, None if alone else sibling(shards), _no_sibling(str(address))
        )
    if found := _shards(_folder_of(address)):
        return found
    raise _no_shards(address)


def _folder_of(address: Address) -> Address:
    """The folder that its manifest stands for, too. UserError for other files."""
    if address.name == MANIFEST:
        return address.parent
    if address.name.lower().endswith(tuple(SUFFIXES)):
        raise UserError(
            f"{address}: lists of single images are read from file systems only, as each would be a request; pack them "
            "(hvd-lb data pack) and upload the folder"
        )
    return address


def _no_shards(address: Address) -> UserError:
    if not address.is_bucket:
        try:
            store.content(address / MANIFEST)
        except store.Denied as denied:
            return denied
        except store.Missing:
            pass
    nothing = (
        "holds no train-NUMBER.tar"
        if address.is_bucket
        else f"has no {MANIFEST}, and web servers list nothing"
    )
    return UserError(
        f"{address}: {nothing}; give what `hvd-lb data pack` wrote, or name shards as in "
        f"{quote(f'{address}/train-{{000..127}}.tar')}"
    )


def _shards(folder: Place) -> Sources | None:
    """Those that lie in a folder by their usual names. UserError where there are no training shards among them."""
    by_split = shards_in(folder)
    if train := by_split.get("train"):
        return Sources(_resolved(folder).name, train, by_split.get("val"), f"{folder}: has no val-….tar")
    if by_split:
        raise UserError(f"{folder}: has shards val-….tar, but no train-….tar")
    return None


def _no_sibling(spec: str) -> str:
    return f"{spec}: no validation shards beside it (val instead of train in the name)"


def _resolved(place: Place) -> Place:
    return place.resolve() if isinstance(place, Path) else place


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _split_folders(path: Path, inside: Inside) -> dict[Split, str]:
    """The names of the folders of splits; none where a folder of such a name is a class, as `train` among vehicles."""
    named = [name for name in inside.folders if split_of(name)]
    if len(named) < len(inside.folders) and not any(look_into(path / name).folders for name in named):
        return {}
    return find_splits(named, path)


def _folders(path: Path, splits: dict[Split, str], alone: bool) -> Sources:
    if "train" not in splits:
        other = next(iter(splits.values()))
        raise UserError(
            f"{path}: has {other}/, but no train/; expected both. If {other}/ is all there is, give --data "
            f"{quote(str(path / other))} --val-fraction 0.1, which holds out a tenth of it, or to evaluate on "
            "all of it without --val-fraction"
        )
    name = path.parents[2].resolve().name if _is_kaggle(path) else path.resolve().name
    train = FolderSource(path / splits["train"], path, splits["train"])
    inside = look_into(train.root)
    if inside.images and not inside.folders:
        raise UserError(
            f"{train.root}: holds images ({inside.images[0]}), but no class folders; {_how_to_label(path)}"
        )
    if not inside.folders and tar_files(train.root):
        raise UserError(
            f"{train.root}: holds shards, not class folders; name them: --data {quote(str(train.root / '*.tar'))}, "
            "and those of the validation images with --val"
        )
    found = None if alone else splits.get("val") or splits.get("test")
    if found is not None and "val" not in splits and not look_into(path / found).folders:
        found = None  # the images of a competition, whose classes nobody tells
    if found is None:
        return Sources(name, train, None, f"{path}: has no val/")
    root = path / found
    _refuse_same(train.root, root)
    inside = look_into(root)
    if inside.images and not inside.folders:
        return Sources(name, train, _unsorted(path, root, inside), "")
    val = FolderSource(root, path, found, others=(train.root,))
    notes: tuple[str, ...] = ()
    if (train.root.name, found) != ("train", "val"):
        notes = (f"{train.root.name}/ is trained on, {found}/ is the validation split",)
    return Sources(name, replace(train, others=(root,)), val, "", notes)


def _how_to_label(path: Path) -> str:
    """What to do where images of the splits in `path` lie in no class folders."""
    for entry in sorted(path.iterdir()):
        if _is_list(entry) and split_of(entry.stem):
            return f"give --data {quote(str(entry))}, if that names each with its label"
    return "sort them into these, or name each with its label in a list (docs/data.md)"


def _is_kaggle(path: Path) -> bool:
    return path.resolve().match("ILSVRC/Data/CLS-LOC")


def _unsorted(path: Path, root: Path, inside: Inside) -> Source:
    """Validation images without class folders: their classes are in Kaggle's list, or unknown."""
    for folder in path.resolve().parents[:3]:
        if (folder / _KAGGLE_LABELS).is_file():
            return ListSource(folder / _KAGGLE_LABELS, images=root)
    kaggle = f", or copy {_KAGGLE_LABELS} of the same download to beside ILSVRC/" if _is_kaggle(path) else ""
    raise UserError(
        f"{root}: its images ({inside.images[0]}) lie in no class folders; sort them into folders called as those "
        f"of the training images, name them with their labels in a list and give --val LIST.csv{kaggle}"
    )


def _lists(folder: Path, train: Path, alone: bool) -> Sources:
    _refuse_no_file(train)
    expected = renamed(train.name, "val") or f"val{train.suffix}"
    lists = [] if alone else [entry.name for entry in folder.iterdir() if _is_list(entry)]
    found = find_partners(train.name, lists, folder)
    name = found.get("val") or found.get("test")
    val = ListSource(folder / name, training=ListSource(train)) if name else None
    notes = (
        () if name in (None, expected) else (f"{train.name} is trained on, {name} is the validation split",)
    )
    return Sources(folder.resolve().name, ListSource(train), val, f"{train}: no {expected} beside it", notes)


def _refuse_no_file(path: Path) -> None:
    if not path.is_file():  # a pipe would be waited for
        raise UserError(
            f"{path}: {'is no file, but a pipe or the like' if path.exists() else 'no such file'}"
        )


def _validation(spec: str) -> Source:
    """What `--val spec` names."""
    refuse_remote(spec)
    if is_address(spec):
        address = Address.of(spec)
        if is_pattern(str(address)):
            return named_shards(spec)
        by_split = shards_in(_folder_of(address))
        if not by_split:
            raise _no_shards(address)
        return by_split.get("val") or by_split["train"]
    path = Path(spec).expanduser()
    if is_pattern(spec):
        return named_shards(spec)
    if _is_list(path):
        _refuse_no_file(path)
        return ListSource(path)
    inside = look_into(path)
    splits = _split_folders(path, inside)
    if splits:
        name = splits.get("val") or splits.get("test") or splits["train"]
        raise UserError(
            f"--val {spec}: has splits of its own; name the one that is meant, such as --val {quote(str(path / name))}"
        )
    shards = {} if inside.folders else shards_in(path)
    if shards:
        return shards.get("val") or shards["train"]
    return FolderSource(path, path, "as-val")


def _refuse_same(train: Path, val: Path) -> None:
    if train.resolve() == val.resolve():
        raise UserError(
            f"{val}: is what is trained on ({train}), so nothing would be validated; give another, or "
            "--val-fraction 0.1 to hold out a tenth of it"
        )


def _no_val(path: Path, inside: Inside) -> str:
    """With what is meant where the folder above, or one in it, has both splits."""
    above = path.resolve().parent
    own, others = split_of(path.resolve().name), {split_of(name) for name in look_into(above).folders}
    if own == "train" and others & {"val", "test"}:
        return f"{path}: is one split only; give --data {quote(str(above))}, which has both"
    if inside.folders and "train" in _split_folders(first := path / inside.folders[0], look_into(first)):
        return f"{path}: has no images of its own; give --data {quote(str(first))}, which has splits"
    return f"{path}: has no val/"
