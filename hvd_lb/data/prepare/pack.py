"""A data set as WebDataset tar shards: few large files for file systems that are slow with millions of small ones.

A shard is written under another name, put on the disk, renamed, and then entered into a list; nothing looks finished
before everything is (`pack_folder`). So a killed run is continued by the same command, which keeps every
shard whose checksum is right. The bytes of a shard are a function of data set and options: they do not depend on how
often that happened, nor on the number of threads.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from hvd_lb.data.images import Dataset, Images, Progress, images_of
from hvd_lb.data.prepare.encode import EncodedImage, Encoding, encoded_in_order
from hvd_lb.data.prepare.pack_folder import PackFolder
from hvd_lb.data.prepare.shard_writer import Shard, ShardWriter, sample_bytes
from hvd_lb.errors import UserError

SHARD_BYTES = 500_000_000

_SAMPLE = 200
_SAMPLING_ERROR = 1.05
_MOST_SHARDS = 1_000_000  # their numbers have six digits
_REPORT_EVERY = 50


@dataclass(frozen=True)
class Packed:
    """The shards in the folder, and how many of them had been there before."""

    shards: dict[str, Shard]
    kept: int

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards.values())

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards.values())

    @property
    def undecodable(self) -> int:
        """Images that had to be shrunk but would not decode: they are kept as they are."""
        return sum(shard.undecodable for shard in self.shards.values())


@dataclass(frozen=True)
class _PackOptions:
    folder: PackFolder
    encoding: Encoding
    shard_bytes: int
    threads: int
    report: Progress


def pack(
    dataset: Dataset,
    target: Path,
    *,
    source: str,
    shard_bytes: int = SHARD_BYTES,
    encoding: Encoding | None = None,
    threads: int = 8,
    on_progress: Progress | None = None,
) -> Packed:
    """Write `dataset`, which `source` names, to `target`, or finish doing so.

    A shard has at most `shard_bytes` bytes, unless a single image needs more. UserError: a target that holds something
    else or the same with other options, too little room, an image that cannot be read.
    """
    if shard_bytes < 1 or threads < 1:
        raise ValueError(f"shard_bytes={shard_bytes}, threads={threads}: expected positive numbers")
    encoding = encoding or Encoding()
    made_from = {"data": images_of(dataset.fingerprint()), "shard_size": shard_bytes, **encoding.parameters()}
    folder = PackFolder(target, made_from, source)
    job = _PackOptions(
        folder, encoding, shard_bytes, threads, on_progress or (lambda label, done, total: None)
    )
    if folder.finished and _intact(job):
        return Packed(folder.shards, len(folder.shards))
    _check_room(dataset, job)
    try:
        with folder.begun():
            kept = sum(
                _pack_split(job, split, images)
                for split, images in (("train", dataset.train), ("val", dataset.val))
            )
            folder.publish(dataset.train.classes)
    except OSError as error:
        if error.errno == errno.ELOOP:  # of the name that was given: it does not go on
            raise
        raise UserError(
            f"{error.filename or target}: {error.strerror or error}; the same command goes on where this one ended"
        ) from error
    return Packed(folder.shards, kept)


def _pack_split(job: _PackOptions, split: str, images: Images) -> int:
    """One shard after another: where one ends is known when its images are. Returns how many were kept."""
    kept = 0
    with closing(_Stream(images, job.encoding, job.threads)) as stream:
        for number in count():
            if stream.position == len(images):
                break
            name = f"{split}-{number:06d}.tar"
            shard = job.folder.kept(name)
            if shard is None:
                job.folder.enter(name, _write_shard(job, split, job.folder.path(name), images, stream))
            else:
                stream.skip(shard.images)
                kept += 1
            job.report(f"packing {split}", stream.position, len(images))
    return kept


def _write_shard(job: _PackOptions, split: str, path: Path, images: Images, stream: _Stream) -> Shard:
    with ShardWriter(path) as writer:
        while (image := stream.peek()) is not None:
            label = int(images.labels[stream.position])
            if writer.images and writer.bytes_with(image, label) > job.shard_bytes:
                break
            writer.add(f"{stream.position:012d}", image, label)
            stream.pop()
            if stream.position % _REPORT_EVERY == 0:
                job.report(f"packing {split}", stream.position, len(images))
        return writer.finish()


class _Stream:
    """The encoded images of a split in order, read and encoded ahead; `position` is the number of the next."""

    def __init__(self, images: Images, encoding: Encoding, threads: int) -> None:
        self._images, self._encoding, self._threads = images, encoding, threads
        self._ahead: Generator[EncodedImage] | None = None
        self._held: EncodedImage | None = None
        self.position = 0

    def peek(self) -> EncodedImage | None:
        """The next image; None at the end."""
        if self._held is None and self.position < len(self._images):
            if self._ahead is None:
                self._ahead = encoded_in_order(self._images, self.position, self._encoding, self._threads)
            self._held = next(self._ahead)
        return self._held

    def pop(self) -> None:
        self._held = None
        self.position += 1

    def skip(self, images: int) -> None:
        self.close()
        self.position += images

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._held = None


def _intact(job: _PackOptions) -> bool:
    """Whether all shards of a finished folder are there and whole."""
    whole = 0
    for done, name in enumerate(job.folder.shards, start=1):
        whole += job.folder.kept(name) is not None
        job.report("checking shards", done, len(job.folder.shards))
    return whole == len(job.folder.shards)


def _check_room(dataset: Dataset, job: _PackOptions) -> None:
    """UserError where the shards still to be written will hardly fit, by a sample of the images."""
    needed = 0.0
    for split, images in (("train", dataset.train), ("val", dataset.val)):
        done = sum(shard.images for name, shard in job.folder.shards.items() if name.startswith(split))
        needed += (len(images) - done) * _mean_bytes(images, job)
    if needed > _MOST_SHARDS * job.shard_bytes:
        raise UserError(
            f"{_size(needed)} in shards of {job.shard_bytes:,} bytes are more than a million shards: "
            "give a larger --shard-size"
        )
    place = next(
        folder
        for folder in (job.folder.target.resolve(), *job.folder.target.resolve().parents)
        if folder.is_dir()
    )
    if needed > (free := shutil.disk_usage(place).free):
        raise UserError(
            f"{job.folder.target}: {_size(free)} free, but about {_size(needed)} are to be written; "
            "choose another disk, or shrink images with --max-side"
        )


def _mean_bytes(images: Images, job: _PackOptions) -> float:
    """What a sample takes on average; of many images an estimate, on the high side."""
    many = len(images) > _SAMPLE
    ids = np.random.default_rng(0).integers(len(images), size=_SAMPLE) if many else np.arange(len(images))

    def measure(image_id: np.int64) -> int:
        return sample_bytes(job.encoding(images, int(image_id)), int(images.labels[image_id]))

    with ThreadPoolExecutor(job.threads, "hvd-lb estimate") as pool:
        return float(np.mean(list(pool.map(measure, ids)))) * (_SAMPLING_ERROR if many else 1)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
