"""A data set as class folders: train/CLASS/000000000000.png and so on, the numbers being those of the images.

The counterpart of `pack`, for named data sets and for shards. All is made in TARGET/.unfinished and moved
when whole; a killed run is begun anew.
"""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

from hvd_lb.data.files.kinds import is_ignored
from hvd_lb.data.images import Dataset, Images, Progress
from hvd_lb.data.options import UNFINISHED
from hvd_lb.data.prepare.encode import Encoding, encoded_in_order
from hvd_lb.errors import UserError

_REPORT_EVERY = 50


def export(
    dataset: Dataset, target: Path, *, threads: int = 8, on_progress: Progress | None = None
) -> list[str]:
    """Write `dataset` to a new or empty folder; the names of its class folders, in the order of the labels.

    A slash in the name of a class becomes a hyphen. UserError: a target that is not empty, classes that cannot be
    folders.
    """
    folders = [name.replace("/", "-") for name in dataset.train.classes]
    if bad := [name for name in folders if not name or is_ignored(name) or "\0" in name]:
        raise UserError(f"class {bad[0]!r} cannot be the name of a class folder")
    if len(set(folders)) < len(folders):
        raise UserError(f"{dataset.name}: two classes would have the same folder")
    if target.exists() and (not target.is_dir() or set(os.listdir(target)) - {UNFINISHED}):
        raise UserError(f"{target}: is not empty; give a new folder")
    work = target / UNFINISHED
    report = on_progress or (lambda label, done, total: None)
    try:
        shutil.rmtree(work, ignore_errors=True)
        for split, images in (("train", dataset.train), ("val", dataset.val)):
            _export_split(split, images, [work / split / folder for folder in folders], threads, report)
        for split in ("train", "val"):
            (work / split).rename(target / split)
        work.rmdir()
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from error
    return folders


def _export_split(split: str, images: Images, folders: list[Path], threads: int, report: Progress) -> None:
    for folder in folders:
        folder.mkdir(parents=True)
    with closing(encoded_in_order(images, 0, Encoding(), threads)) as files:
        for image_id, file in enumerate(files):
            folder = folders[int(images.labels[image_id])]
            (folder / f"{image_id:012d}{file.ending}").write_bytes(file.content)
            if (image_id + 1) % _REPORT_EVERY == 0 or image_id + 1 == len(images):
                report(f"exporting {split}", image_id + 1, len(images))
