"""Sides and orientation of an AVIF file from its boxes (ISO/IEC 23008-12, HEIF), without its image data."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from hvd_lb.data.files.section import Section

_MOST_BOXES = 1000
# By the properties irot (quarter turns against the clock) and imir (1: left and right), as Pillow reads them.
_ORIENTATIONS = {
    (0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6,
    (0, 0): 4, (1, 0): 5, (2, 0): 2, (3, 0): 7,
    (0, 1): 2, (1, 1): 7, (2, 1): 4, (3, 1): 5,
}  # fmt: skip

Box = tuple[bytes, int, int]
"""Its kind, and where its content begins and ends."""


def avif_size(section: Section) -> tuple[int, int, int] | None:
    """Width and height in pixels as stored, EXIF orientation; None where PIL has to judge (sequences, for one)."""
    try:
        return _primary(section)
    except (struct.error, LookupError):
        return None


def brands(section: Section) -> set[bytes]:
    """What a file says that it can be read as."""
    (size,) = struct.unpack(">I", section.at(0, 4))
    names = section.at(8, min(size, 4096) - 8)  # with a version between the first and the others
    return {names[start : start + 4] for start in range(0, len(names), 4) if start != 4}


def _primary(section: Section) -> tuple[int, int, int]:
    if section.at(8, 4) != b"avif":
        raise LookupError("no still image")
    start, stop = _inside(section, 0, section.length)[b"meta"]
    meta = _inside(section, start + 4, stop)
    at = meta[b"pitm"][0]
    item = int.from_bytes(section.at(at + 4, 4 if section.at(at, 1)[0] else 2), "big")
    properties = _inside(section, *meta[b"iprp"])
    own = _properties_of(section, properties[b"ipma"][0], item)
    size, turn, mirror = None, 0, None
    for number, (kind, start, _) in enumerate(_boxes(section, *properties[b"ipco"]), start=1):
        if number not in own:
            continue
        if kind == b"ispe" and size is None:
            size = struct.unpack(">II", section.at(start + 4, 8))
        elif kind == b"irot":
            turn = section.at(start, 1)[0] & 3
        elif kind == b"imir":
            mirror = section.at(start, 1)[0] & 1
    if size is None:
        raise LookupError("no size")
    return *size, _ORIENTATIONS[turn, mirror]


def _properties_of(section: Section, start: int, item: int) -> set[int]:
    """Numbers of the boxes in ipco, from 1, that belong to an item."""
    version, flags, entries = struct.unpack(">B2xBI", section.at(start, 8))
    at = start + 8
    for _ in range(min(entries, _MOST_BOXES)):
        form = ">IB" if version else ">HB"
        number, count = struct.unpack(form, section.at(at, struct.calcsize(form)))
        at += struct.calcsize(form)
        width, mask = (
            (2, 0x7FFF) if flags & 1 else (1, 0x7F)
        )  # the highest bit says that a reader must know it
        found = section.at(at, width * count)
        if number == item:
            starts = range(0, len(found), width)
            return {int.from_bytes(found[start : start + width], "big") & mask for start in starts}
        at += width * count
    raise LookupError("no properties")


def _inside(section: Section, start: int, stop: int) -> dict[bytes, tuple[int, int]]:
    """The first box of each kind."""
    found: dict[bytes, tuple[int, int]] = {}
    for kind, *place in _boxes(section, start, stop):
        found.setdefault(kind, (place[0], place[1]))
    return found


def _boxes(section: Section, start: int, stop: int) -> Iterator[Box]:
    for _ in range(_MOST_BOXES):
        if start + 8 > stop:
            return
        size, kind = struct.unpack(">I4s", section.at(start, 8))
        head = 8
        if size == 1:
            (size,), head = struct.unpack(">Q", section.at(start + 8, 8)), 16
        end = start + size if size else stop
        if end < start + head or end > stop:
            raise LookupError("a box that ends outside of the one around it")
        yield kind, start + head, end
        start = end
