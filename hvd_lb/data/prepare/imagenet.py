"""ImageNet (ILSVRC2012) as it is downloaded, three tar files, to train/ and val/ with class folders.

Everything is made in a folder beside its place and renamed when whole: a class when all its images are there,
train/ and val/ when they have been counted. So a killed run leaves nothing that looks finished, and the next
one goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hvd_lb.data.options import UNFINISHED
from hvd_lb.errors import UserError

if TYPE_CHECKING:
    from hvd_lb.data.images import Progress

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

_CLASS = re.compile(r"n\d{8}")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_IMAGE_SUFFIX = ".JPEG"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Counts:
    """Images and classes of a prepared folder."""

    train: int
    val: int
    classes: int


ILSVRC2012 = Counts(train=1_281_167, val=50_000, classes=1_000)


def prepare_imagenet(
    source: Path, target: Path, *, expected: Counts | None = ILSVRC2012, on_progress: Progress | None = None
) -> Counts:
    """Unpack the three files in `source` to `target`, or finish doing so; `expected` None accepts any counts.

    `on_progress(label, done, total)` is told bytes of each tar file. UserError for missing, broken or
    incomplete files, wrong counts and a full disk; what has been unpacked so far stays for the next call.
    """
    if not all((target / split).is_dir() for split in ("train", "val")):
        _unpack(source, target, expected, on_progress or (lambda label, done, total: None))
    train, classes = _counted("train", target, expected)
    val, _ = _counted("val", target, expected)
    return Counts(train, val, classes)


def count(folder: Path) -> tuple[int, int]:
    """Images in finished class folders, and such folders."""
    classes = [folder / entry.name for entry in os.scandir(folder) if _CLASS.fullmatch(entry.name)]
    return sum(entry.name.endswith(_IMAGE_SUFFIX) for path in classes for entry in os.scandir(path)), len(
        classes
    )


def _unpack(source: Path, target: Path, expected: Counts | None, report: Progress) -> None:
    work = target / UNFINISHED
    # Looked for before anything is written, the one that is needed last too.
    devkit, train, val = (_archive(source, name) for name in (DEVKIT, TRAIN_TAR, VAL_TAR))
    classes = val_classes(devkit)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    if not (target / "train").is_dir():
        _unpack_train(train, work / "train", report)
        _counted("train", work, expected)
        (work / "train").rename(target / "train")
    if not (target / "val").is_dir():
        _unpack_val(val, work / "val", classes, report)
        _counted("val", work, expected)
        (work / "val").rename(target / "val")
    shutil.rmtree(work)


def val_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image, in the order of their numbers, from the development kit.

    The ground truth is in ILSVRC2012_IDs, which are not in the order of WordNet ids; meta.mat relates them.
    """
    from hvd_lb.data.prepare.matlab import read_structs  # needs numpy, which --help does not

    with _opened(devkit, "r:gz") as archive:
        files = {Path(member.name).name: member for member in archive if member.isfile()}
        try:
            meta, truth = (
                _stream(archive, files[name]).read()
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
            names = {int(s["ILSVRC2012_ID"][0]): str(s["WNID"]) for s in read_structs(meta)}
            return [names[int(line)] for line in truth.split()]
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"{devkit}: no ILSVRC2012 development kit ({error}); download it again"
            ) from error


def _unpack_train(path: Path, folder: Path, report: Progress) -> None:
    """A tar of one tar for each class."""
    folder.mkdir(exist_ok=True)
    with _opened(path, "r:") as outer:
        for member in outer:
            name, _, suffix = Path(member.name).name.partition(".")
            if not member.isfile() or suffix != "tar" or not _CLASS.fullmatch(name):
                continue
            if not (folder / name).is_dir():
                partial = folder / f"{name}{_PARTIAL}"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                with tarfile.open(fileobj=_stream(outer, member), mode="r:") as inner:
                    for image, file in _images(inner):
                        _write(file, partial / image)
                partial.rename(folder / name)
            report("train", member.offset_data + member.size, path.stat().st_size)


def _unpack_val(path: Path, folder: Path, classes: list[str], report: Progress) -> None:
    """A flat tar of images, whose names end in their number, from 1."""
    for name in set(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with _opened(path, "r:") as archive:
        for image, file in _images(archive):
            named = _VAL_IMAGE.fullmatch(image)
            if named is None or not 1 <= int(named[1]) <= len(classes):
                raise UserError(f"{path}: {image} is none of the {len(classes)} images that the devkit knows")
            place = folder / classes[int(named[1]) - 1] / image
            if not place.exists():
                partial = folder / f"{image}{_PARTIAL}"
                _write(file, partial)
                partial.rename(place)
            report("val", archive.offset, path.stat().st_size)
    for left in folder.glob(f"*{_PARTIAL}"):
        left.unlink()


def _images(archive: tarfile.TarFile) -> Iterator[tuple[str, BinaryIO]]:
    """(name, content) of the images; of a name only its last part counts, so none leads out of the folder."""
    for member in archive:
        name = Path(member.name).name
        if member.isfile() and name.endswith(_IMAGE_SUFFIX) and not name.startswith("."):
            yield name, _stream(archive, member)


def _stream(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    stream = archive.extractfile(member)
    if stream is None:
        raise tarfile.ReadError(f"{member.name} is no file")
    return stream  # type: ignore[return-value]


def _write(source: BinaryIO, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(source, file)


def _archive(source: Path, name: str) -> Path:
    if not (source / name).is_file():
        raise UserError(f"{source / name}: not there; download it from image-net.org (it needs an account)")
    return source / name


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            yield archive
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{path}: broken or incomplete ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error} while unpacking") from error


def _counted(split: str, folder: Path, expected: Counts | None) -> tuple[int, int]:
    found = count(folder / split)
    if expected is not None and found != (wanted := (getattr(expected, split), expected.classes)):
        raise UserError(
            f"{split}: {found[0]:,} images in {found[1]:,} classes, expected {wanted[0]:,} in {wanted[1]:,}; "
            f"delete {folder / split} and get the tar file anew, or give --allow-partial"
        )
    return found
