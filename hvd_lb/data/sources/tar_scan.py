"""What a tar shard holds: where each image lies in it, its label and its header, found without unpacking."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hvd_lb.data.files.header import NO_HEADER, header_or_reason
from hvd_lb.data.files.kinds import EXTENSIONS, GIF
from hvd_lb.data.files.reading import retried
from hvd_lb.data.files.rows import ROW, head_sum
from hvd_lb.data.files.section import WINDOW, Section
from hvd_lb.errors import UserError

_BLOCK = 512
_LONGEST_LABEL, _LONGEST_JSON = 1 << 12, 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"\x04\x22": "lz4"}
_LINKED = "is a link: pack what it points to (tar --dereference --hard-dereference)"


@dataclass(frozen=True)
class Scan:
    """The images of a shard: rows whose labels are positions in `labels`, and their names in one piece."""

    rows: np.ndarray
    names: bytes
    labels: list[str]
    first_broken: tuple[int, str] | None

    def to_bytes(self) -> bytes:
        """For a journal."""
        head = json.dumps([self.labels, self.first_broken, len(self.rows)]).encode("ascii")
        return b"\n".join([head, self.rows.tobytes() + self.names])

    @classmethod
    def from_bytes(cls, content: bytes) -> Scan:
        head, _, rest = content.partition(b"\n")
        labels, broken, count = json.loads(head)
        end = count * ROW.itemsize
        rows = np.frombuffer(rest[:end], ROW).copy()
        return cls(rows, rest[end:], labels, tuple(broken) if broken else None)


class _Member(NamedTuple):
    name: str
    start: int
    size: int


@dataclass
class _Sample:
    image: _Member | None = None
    labels: dict[str, _Member] = field(default_factory=dict)  # by ending


def scan_shard(path: Path) -> Scan:
    """UserError, in one line, for a shard or a sample in it that is not whole."""
    return retried(lambda: _scan(path), os.fspath(path))


def _scan(path: Path) -> Scan:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        section = Section.of_file(descriptor, 0, os.fstat(descriptor).st_size)
        samples = _samples(path, section)
        return _scanned(path, descriptor, section, samples)
    finally:
        os.close(descriptor)


def _scanned(path: Path, descriptor: int, section: Section, samples: dict[str, _Sample]) -> Scan:
    rows: list[tuple[int, ...]] = []
    names: list[bytes] = []
    labels: dict[str, int] = {}
    at, first_broken = 0, None
    for key, sample in samples.items():
        if sample.image is None:
            raise UserError(f"{path}: {key!r} has a label, but no image ({' '.join(EXTENSIONS)})")
        label = labels.setdefault(_label(path, key, section, sample), len(labels))
        name = os.fsencode(sample.image.name)
        start, size = sample.image.start, sample.image.size
        image = Section.of_file(descriptor, start, size)
        head = head_sum(image.at(0, WINDOW))
        header = header_or_reason(image)
        if isinstance(header, str):
            first_broken = first_broken or (len(rows), header)
            header = NO_HEADER
        rows.append((label, size, start, at, header.width, header.height, 0, len(name), *header[2:], head))
        names.append(name)
        at += len(name)
    return Scan(np.array(rows, ROW), b"".join(names), list(labels), first_broken)


def _samples(path: Path, section: Section) -> dict[str, _Sample]:
    """By key, in the order of the images."""
    _refuse_compressed(path, section)
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(fileobj=section, mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep all
                _sort_in(path, samples, member)
            end = section.at(archive.offset, _BLOCK)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if section.failure is not None:
            raise section.failure from None
        raise UserError(f"{path}: no whole tar file ({error}); copy it again") from error
    if len(end) < _BLOCK:
        raise UserError(f"{path}: ends without the mark of its end, so it was cut short; copy it again")
    if any(end):
        raise UserError(
            f"{path}: has no tar header at byte {archive.offset}, where one has to be; copy it again"
        )
    return dict(sorted(samples.items(), key=lambda of: of[1].image.start if of[1].image else -1))


def _sort_in(path: Path, samples: dict[str, _Sample], member: tarfile.TarInfo) -> None:
    folder, slash, base = member.name.rpartition("/")
    stem, dot, ending = base.partition(".")
    if not stem or not dot:  # hidden, or of no kind
        return
    key, kind = f"{folder}{slash}{stem}", ending.lower()
    image = f".{kind}" in EXTENSIONS
    if not image and kind not in ("cls", "json", "gif"):
        return
    if not member.isreg() or member.issparse():
        if member.isdir():
            return
        raise UserError(
            f"{path}: {member.name!r} {_LINKED if not member.issparse() else 'is stored sparsely'}"
        )
    if kind == "gif":
        raise UserError(f"{path}: {member.name!r}: {GIF}")
    found = _Member(member.name, member.offset_data, member.size)
    sample = samples.setdefault(key, _Sample())
    if image:
        if sample.image is not None:
            raise UserError(f"{path}: {key!r} has two images, {sample.image.name!r} and {member.name!r}")
        sample.image = found
    elif sample.labels.setdefault(kind, found) is not found:
        raise UserError(f"{path}: {member.name!r} is there twice")


def _label(path: Path, key: str, section: Section, sample: _Sample) -> str:
    if cls := sample.labels.get("cls"):
        if cls.size <= _LONGEST_LABEL:
            content = section.at(cls.start, cls.size)
            if label := content.decode("utf-8", "surrogateescape").strip():
                return label
        raise UserError(f"{path}: {cls.name!r} is no label; expected a number or the name of a class")
    member = sample.labels.get("json")
    if member is None:
        raise UserError(f"{path}: {key!r} has no label; expected {key}.cls or {key}.json")
    try:
        values = json.loads(section.at(member.start, min(member.size, _LONGEST_JSON)))
        label = values.get("label", values.get("cls"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {member.name!r} is no JSON object ({error})") from error
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise UserError(
            f"{path}: {member.name!r} has no label; expected a number or a name as `label` or `cls`"
        )
    return str(label)


def _refuse_compressed(path: Path, section: Section) -> None:
    head = section.at(0, 2)
    if head in _COMPRESSED:
        raise UserError(
            f"{path}: is compressed ({_COMPRESSED[head]}), so nothing in it can be read alone; decompress it"
        )
