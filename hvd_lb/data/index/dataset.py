"""From a path to a data set: its sources, their indexes, and what may be wrong with them as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hvd_lb.data.images import Dataset, Progress
from hvd_lb.data.index.hold_out import divide
from hvd_lb.data.index.images import IndexedImages
from hvd_lb.data.index.index import Check, Index, open_index
from hvd_lb.data.options import OnBadImage
from hvd_lb.data.sources.find import Sources, find_sources
from hvd_lb.data.sources.folders import FolderSource
from hvd_lb.data.sources.names import some
from hvd_lb.data.sources.source import Source
from hvd_lb.errors import UserError

_FINGERPRINT = re.compile("[0-9a-f]{16}(-[0-9a-f]{16}){2}")


@dataclass(frozen=True)
class IndexedDataset(Dataset):
    """A data set of two indexes, whose fingerprint is kept with that of the training split."""

    train: IndexedImages
    val: IndexedImages

    def fingerprint(self) -> str:
        if known := self.known_fingerprint():
            return known
        found = super().fingerprint()
        for images in (self.train, self.val):
            images.index.forget()
        for path in self._memos():
            with suppress(OSError):
                path.write_text(found, "ascii")
                break
        return found

    def known_fingerprint(self) -> str | None:
        """As it was computed before, without a look at the rows."""
        for path in self._memos():
            with suppress(OSError, ValueError):
                if _FINGERPRINT.fullmatch(text := path.read_text("ascii")):
                    return text
        return None

    def _memos(self) -> list[Path]:
        name = f"fingerprint-{self.train.index.facts.sum:08x}-{self.val.index.identity}"
        return [
            folder / name for folder in self.train.index.keep if self.val.index.identity and folder.is_dir()
        ]


def open_path(
    spec: str,
    *,
    val: str | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_bad_image: OnBadImage = "fail",
    check: Check = "quick",
    write_beside: bool = False,
) -> IndexedDataset:
    """The training and validation split of `spec`; the second is `val`, or with `val_fraction` held out of the first.

    `check` and `write_beside` as in `open_index`. UserError for what cannot be trained on.
    """
    if val is not None and val_fraction is not None:
        raise UserError(f"--val {val} and --val-fraction {val_fraction}: give one of them")
    sources = find_sources(spec, val)

    def index(source: Source) -> Index:
        opened = open_index(source, on_progress, on_bad_image, check=check, write_beside=write_beside)
        if not opened.facts.images:
            raise UserError(f"{source.root}: holds no images ({source.name}); expected some of each class")
        return opened

    if val_fraction is not None:
        return _divided(sources, index, val_fraction, seed)
    if sources.val is None:
        raise UserError(
            f"{sources.no_val}; give --val PATH, or --val-fraction 0.1 to hold out a tenth of the images"
        )
    train = index(sources.train)
    _check_classes(train, sources.train)
    of_val = index(sources.val.with_classes(train.classes))
    notes = (*sources.notes, *train.facts.remarks, *of_val.facts.remarks)
    splits = IndexedImages(train), IndexedImages(of_val)
    return IndexedDataset(sources.name, *splits, notes=notes, class_folders=_class_folders(sources))


def _divided(
    sources: Sources, index: Callable[[Source], Index], fraction: float, seed: int
) -> IndexedDataset:
    if sources.val is not None:
        raise UserError(
            f"--val-fraction {fraction}: {sources.name} has a {sources.val.name} of its own; leave the option out"
        )
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction {fraction}: expected a number between 0 and 1")
    whole = index(sources.train)
    parts = divide(whole, fraction, seed)
    if not parts.val.facts.images:
        raise UserError(
            f"{whole.root}: no class has two images, so none can be held out; give a folder with val/"
        )
    _check_classes(parts.train, sources.train)
    notes = (*sources.notes, *whole.facts.remarks)
    splits = IndexedImages(parts.train), IndexedImages(parts.val)
    return IndexedDataset(sources.name, *splits, notes=notes, class_folders=_class_folders(sources))


def _class_folders(sources: Sources) -> tuple[Path, ...]:
    return tuple(source.root for source in (sources.train, sources.val) if isinstance(source, FolderSource))


def _check_classes(index: Index, source: Source) -> None:
    """UserError where there is nothing to learn a class from, or, of folders, one class only: a wrong level."""
    empty = [name for name, count in zip(index.classes, index.facts.counts, strict=True) if not count]
    if empty == ["0"] and index.classes[1:2] == ["1"]:
        raise UserError(
            f"{index.root}: labels begin at 1, but are counted from 0, so class 0 would have no images; subtract 1, or "
            "name the classes in classes.txt, one a line, and label by name"
        )
    if empty:
        raise UserError(f"{index.root}: no images to train on in {some(empty)}; fill or remove these classes")
    if isinstance(source, FolderSource) and len(index.classes) == 1:
        raise UserError(
            f"{index.root}: has one class folder only ({index.classes[0]}), so there is nothing to tell apart; "
            "expected the folder that holds a folder for each class"
        )


def index_splits(
    spec: str,
    *,
    val: str | None = None,
    val_fraction: float | None = None,
    on_progress: Progress | None = None,
    check: Check = "quick",
    write_beside: bool = False,
) -> tuple[dict[str, Index], tuple[str, ...]]:
    """By split, the indexes of `spec`, made where they are missing or old, with all that a run would keep beside them,
    and what a user should know of how the images were found.

    Broken headers are kept, and data without a validation split are no error. Options as in `open_path`.
    """
    sources = find_sources(spec, val)
    if val_fraction is None and sources.val is None:
        train = open_index(sources.train, on_progress, "skip", check=check, write_beside=write_beside)
        return {"train": train}, (*sources.notes, *train.facts.remarks)
    data = open_path(
        spec,
        val=val,
        val_fraction=val_fraction,
        on_progress=on_progress,
        on_bad_image="skip",
        check=check,
        write_beside=write_beside,
    )
    data.fingerprint()
    return {"train": data.train.index, "val": data.val.index}, data.notes
