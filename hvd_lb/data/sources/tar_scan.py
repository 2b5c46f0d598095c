"""What a tar shard holds: where each image lies in it, its label and its header, found without unpacking."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hvd_lb.data.files.header import NO_HEADER, header_or_reason
from hvd_lb.data.files.kinds import EXTENSIONS, NOT_READ, why_not_read
from hvd_lb.data.files.opening import open_file
from hvd_lb.data.files.reading import retried
from hvd_lb.data.files.rows import ROW, head_sum
from hvd_lb.data.files.section import WINDOW, Section
from hvd_lb.data.remote.address import Address, Place
from hvd_lb.errors import UserError, each_once

PRead = Callable[[int, int], bytes]
T = TypeVar("T")

_BLOCK = 512
_MOST_PADDING = 1 << 20  # tar fills its last record, of 10,240 bytes by default, with zeros
_LONGEST_LABEL, _LONGEST_JSON = 1 << 12, 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"\x04\x22": "lz4"}
_LINKED = "is a link: pack what it points to (tar --dereference --hard-dereference)"
_NUMBER = re.compile(r"(-?)0*([0-9]+)(?:\.0*)?")
_CONTROL = re.compile(r"[\x00-\x1f]")
_LONGEST_NAME = (1 << 16) - 1  # bytes, in a row


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
    """Members that share the name before their last dot."""

    images: list[_Member] = field(default_factory=list)
    labels: dict[str, _Member] = field(default_factory=dict)  # by ending
    wrong: str = ""  # the first member that cannot be used, and why

    @property
    def whole(self) -> bool:
        return bool(self.images and self.labels)


def scan_shard(path: Path) -> Scan:
    """UserError, in one line, for a shard or a sample in it that is not whole."""
    return retried(lambda: _scan(path), os.fspath(path))


def scan_object(address: Address, size: int, pread: PRead) -> Scan:
    """The same of a shard at a server, of so many bytes that `pread(count, position)` gives."""
    return _scanned(address, size, pread)


def _scan(path: Path) -> Scan:
    descriptor = open_file(path)
    try:
        return _scanned(path, os.fstat(descriptor).st_size, partial(os.pread, descriptor))
    finally:
        os.close(descriptor)


def _scanned(path: Place, size: int, pread: PRead) -> Scan:
    section = Section(pread, size)
    samples = _samples(path, section)
    rows: list[tuple[int, ...]] = []
    names: list[bytes] = []
    labels: dict[str, int] = {}
    at, first_broken = 0, None
    for key, sample in samples.items():
        label = labels.setdefault(_label(path, key, section, sample), len(labels))
        (image,) = sample.images
        name = os.fsencode(image.name)
        if len(name) > _LONGEST_NAME:
            raise UserError(f"{path}: {image.name[:80]!r}… has a name of {len(name)} bytes; rename it")
        content = Section(partial(_from, pread, image.start), image.size)
        head = head_sum(content.at(0, WINDOW))
        header = header_or_reason(content)
        if isinstance(header, str):
            first_broken = first_broken or (len(rows), header)
            header = NO_HEADER
        sides = header.width, header.height
        rows.append((label, image.size, image.start, at, *sides, 0, len(name), *header[2:], head))
        names.append(name)
        at += len(name)
    return Scan(np.array(rows, ROW), b"".join(names), list(labels), first_broken)


def _from(pread: PRead, start: int, count: int, position: int) -> bytes:
    return pread(count, start + position)


def _samples(path: Place, section: Section) -> dict[str, _Sample]:
    """By key, in the order of the images; each has one image and a label. UserError."""
    _refuse_compressed(path, section)
    samples: dict[str, _Sample] = {}
    for member in _members(path, section):
        _sort_in(samples, member)
    own = {key: sample for key, sample in samples.items() if not _is_part(path, samples, key)}
    for key, sample in own.items():
        if len(sample.images) > 1:
            first, second = sample.images[:2]
            raise UserError(f"{path}: {key!r} has two images, {first.name!r} and {second.name!r}")
        if sample.wrong:
            raise UserError(f"{path}: {sample.wrong}")
        if not sample.images:
            raise UserError(f"{path}: {key!r} has a label, but no image ({' '.join(EXTENSIONS)})")
    return dict(sorted(own.items(), key=lambda of: of[1].images[0].start))


def _is_part(path: Place, samples: dict[str, _Sample], key: str) -> bool:
    """Whether the members of `key` are further ones of another sample, as `x.seg.png` is beside `x.jpg` and `x.cls`.

    WebDataset takes names up to their first dot for one sample. So does this where that is one; else the last dot ends
    its name, as in `photo.2019.jpg` and `photo.2019.cls`. UserError where both could be meant.
    """
    folder, slash, base = key.rpartition("/")
    parts = base.split(".")
    for count in range(1, len(parts)):
        shorter = f"{folder}{slash}{'.'.join(parts[:count])}"
        if shorter in samples and samples[shorter].whole:
            if samples[key].whole:
                raise UserError(
                    f"{path}: {key!r} has an image and a label, but would belong to {shorter!r} (names are read up to "
                    "their first dot); write another character for the dot"
                )
            return True
    return False


def _members(path: Place, section: Section) -> Iterator[tarfile.TarInfo]:
    """Those of a tar file, or of several that were joined (`cat a.tar b.tar`). UserError for what is no tar file."""
    while True:
        archive: Any = _guarded(path, section, lambda: tarfile.TarFile(fileobj=section))  # type: ignore[arg-type]
        while (member := _guarded(path, section, archive.next)) is not None:
            archive.members.clear()  # it would keep all
            yield member
        end = section.at(archive.offset, _BLOCK)
        if len(end) < _BLOCK:
            raise UserError(f"{path}: ends without the mark of its end, so it was cut short; copy it again")
        if any(end):
            raise UserError(
                f"{path}: has no tar header at byte {archive.offset}, where one has to be; copy it again"
            )
        padding = section.at(archive.offset, _MOST_PADDING)
        if following := padding.lstrip(b"\0"):
            section.seek(archive.offset + len(padding) - len(following))
        elif archive.offset + len(padding) < section.length:
            raise UserError(
                f"{path}: has nothing but zeros from byte {archive.offset} on, so a part is missing; copy it again"
            )
        else:
            return


def _guarded(path: Place, section: Section, read: Callable[[], T]) -> T:
    try:
        return read()
    except UserError:  # of a server
        raise
    except Exception as error:  # what tarfile raises for broken files is not limited to a few types
        if section.failure is not None:
            raise section.failure from None
        raise UserError(f"{path}: no whole tar file ({error}); copy it again") from error


def _sort_in(samples: dict[str, _Sample], member: tarfile.TarInfo) -> None:
    key, dot, ending = member.name.rpartition(".")
    kind = ending.lower()
    base = key.rpartition("/")[2]
    if not base or base.startswith(".") or not dot or "/" in ending:  # hidden, or of no kind
        return
    image, label, other = f".{kind}" in EXTENSIONS, kind in ("cls", "json"), f".{kind}" in NOT_READ
    if not (image or label or other) or member.isdir():
        return
    found = _Member(member.name, member.offset_data, member.size)
    sample = samples.setdefault(key, _Sample())
    if wrong := _why_not(member):
        sample.wrong = sample.wrong or f"{member.name!r} {wrong}"
    elif other:
        sample.wrong = sample.wrong or f"{member.name!r}: {why_not_read(member.name)}"
    elif image:
        sample.images.append(found)
    elif sample.labels.setdefault(kind, found) is not found:
        sample.wrong = sample.wrong or f"{member.name!r} is there twice"


def _why_not(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "is stored sparsely: pack it without --sparse"
    if member.islnk() or member.issym():
        return _LINKED
    return "" if member.isreg() else "is no file, but a pipe or a device: leave it out"


def _label(path: Place, key: str, section: Section, sample: _Sample) -> str:
    """That of KEY.cls, else `label`, else `cls` in KEY.json. UserError for none, or for two that differ.

    A number and a name can both be right: which of them counts is the order above.
    """
    given: dict[str, str] = {}
    if cls := sample.labels.get("cls"):
        content = section.at(cls.start, cls.size) if cls.size <= _LONGEST_LABEL else b""
        text = content.decode("utf-8-sig", "surrogateescape").strip()
        if not text or _CONTROL.search(text):  # several labels, or a number that is not written as text
            raise UserError(f"{path}: {cls.name!r} is no label; expected a number or the name of a class")
        given[repr(cls.name)] = text
    if member := sample.labels.get("json"):
        try:
            values = _object(section, member)
        except (ValueError, RecursionError) as error:
            if not given:
                raise UserError(f"{path}: {member.name!r} is no JSON object ({error})") from error
            values = {}
        for name in ("label", "cls"):
            value = values.get(name)
            if isinstance(value, int | float | str) and not isinstance(value, bool) and value != "":
                given[f"`{name}` in {member.name!r}"] = str(value)
        if not given:
            raise UserError(
                f"{path}: {member.name!r} has no label; expected a number or a name as `label` or `cls`"
            )
    if not given:
        raise UserError(f"{path}: {key!r} has no label; expected {key}.cls or {key}.json")
    (first, label), *others = given.items()
    for where, other in others:
        if _contradict(label, other):
            raise UserError(
                f"{path}: {first} says {label!r}, but {where} says {other!r}; leave one of them out"
            )
    return label


def _object(section: Section, member: _Member) -> dict[str, Any]:
    """ValueError, RecursionError for what is none."""
    values = json.loads(
        section.at(member.start, min(member.size, _LONGEST_JSON)), object_pairs_hook=each_once
    )
    if not isinstance(values, dict):
        raise ValueError(f"but {type(values).__name__}")
    return values


def _contradict(label: str, other: str) -> bool:
    number, another = (_NUMBER.fullmatch(text) for text in (label, other))
    if number and another:
        return number.groups() != another.groups()
    return label != other and not number and not another


def _refuse_compressed(path: Place, section: Section) -> None:
    head = section.at(0, 2)
    if head in _COMPRESSED:
        raise UserError(
            f"{path}: is compressed ({_COMPRESSED[head]}), so nothing in it can be read alone; decompress it"
        )
