"""Width, height and EXIF orientation from an image file's header, without decoding.

JPEG, PNG, WebP and AVIF, what data sets consist of, are read here: a few positional reads, nothing allocated by what a
header claims. Other kinds, and JPEG files that begin unusually, are opened by PIL, which reads no more than they have.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from hvd_lb.data.files.avif import avif_size, brands
from hvd_lb.data.files.kinds import GIF, HEIC, JPEG_2000, JPEG_XL
from hvd_lb.data.files.section import Section

KINDS = ("broken", "JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""Names of `Header.kind`; the first is for files whose header cannot be read."""

_BY_PIL = {"JPEG": 1, "MPO": 1, "PNG": 2, "BMP": 4, "DIB": 4, "TIFF": 5, "PPM": 6, "AVIF": 7}
_NOT_READ = {
    b"GIF8": GIF,
    b"\0\0\0\x0cjP  ": JPEG_2000,
    b"\xff\x4f\xff\x51": JPEG_2000,
    b"\0\0\0\x0cJXL ": JPEG_XL,
    b"\xff\x0a": JPEG_XL,
}
_MOST_PARTS = 1000  # segments or chunks before the image data; a file with more is left to PIL or to decoding
_MOST_SIDE = (1 << 31) - 1
_START_OF_IMAGE_DATA, _EXIF = 0xDA, 0xE1
_FRAMES = (0xC0, 0xC1, 0xC2)
_SKIPPED = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comments, application segments
# Said of broken files, which are told of here, by name.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
_ORIENTATION = ExifTags.Base.Orientation
_FIRST_ON_ITS_SIDE = 5


class BrokenHeader(ValueError):
    """This is no image, or of no kind that is read; the message is the reason, for a person, in one line."""


class Header(NamedTuple):
    """Sides in pixels as stored; EXIF orientation 1 … 8 (1 where none is given); `kind` as in `KINDS`."""

    width: int
    height: int
    orientation: int
    kind: int


NO_HEADER = Header(0, 0, 1, 0)
"""What an index has of a file without one."""


def header_or_reason(section: Section) -> Header | str:
    """As `read_header`, but what is broken is told as a text."""
    try:
        return read_header(section)
    except BrokenHeader as error:
        return str(error)


def read_header(section: Section) -> Header:
    """The header of the image file in `section`. BrokenHeader; OSError when reading itself fails."""
    head = section.at(0, 32)
    found = None
    if head[:2] == b"\xff\xd8":
        found = _jpeg(section)
    elif head[:8] == b"\x89PNG\r\n\x1a\n":
        found = _png(section)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        found = _webp(section, head)
    elif head[4:8] == b"ftyp":
        found = _avif(section)
    elif not head:
        raise BrokenHeader("the file is empty")
    elif other := next((why for magic, why in _NOT_READ.items() if head.startswith(magic)), None):
        raise BrokenHeader(other)
    found = found or _by_pil(section)
    if not (0 < found.width <= _MOST_SIDE and 0 < found.height <= _MOST_SIDE):
        raise BrokenHeader(f"its header says {found.width} x {found.height} pixels")
    return found


def _jpeg(section: Section) -> Header | None:
    """Follows the segments to the image data, as PIL does; None where PIL has to judge."""
    position, orientation, size = 2, 1, None
    for _ in range(_MOST_PARTS):
        head = section.at(position, 10)
        if len(head) < 4 or head[0] != 0xFF:
            return None
        marker, length = head[1], int.from_bytes(head[2:4], "big")
        if marker == _START_OF_IMAGE_DATA:
            return Header(*size, orientation, 1) if size else None
        if length < 2:
            return None
        if marker in _FRAMES:
            frame = section.at(position + 4, 6)
            if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4):
                return None
            height, width = struct.unpack_from(">HH", frame, 1)
            size = (width, height)
        elif marker not in _SKIPPED:
            return None
        elif marker == _EXIF and head[4:10] == b"Exif\0\0" and orientation == 1:
            orientation = _orientation(section.at(position + 10, length - 8))
        position += 2 + length
    return None


def _png(section: Section) -> Header:
    head = section.at(8, 25)
    if len(head) < 25 or head[:8] != b"\0\0\0\rIHDR" or zlib.crc32(head[4:21]) != int.from_bytes(head[21:]):
        raise BrokenHeader("its PNG header is damaged")
    width, height = struct.unpack_from(">II", head, 8)
    orientation, position = 1, 33
    for _ in range(_MOST_PARTS):
        chunk = section.at(position, 8)
        length, kind = int.from_bytes(chunk[:4]), chunk[4:]
        if len(chunk) < 8:
            raise BrokenHeader("it is a PNG file without image data")
        if kind == b"IDAT":
            break
        if kind == b"eXIf":
            orientation = _orientation(section.at(position + 8, length))
        position += 12 + length
    return Header(width, height, orientation, 2)


def _webp(section: Section, head: bytes) -> Header:
    kind = head[12:16]
    if len(head) >= 30 and kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return Header(width & 0x3FFF, height & 0x3FFF, 1, 3)
    if len(head) >= 25 and kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1, 3)
    if len(head) >= 30 and kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        return Header(width, height, _webp_orientation(section) if head[20] & 8 else 1, 3)
    raise BrokenHeader("its WebP header is damaged")


def _webp_orientation(section: Section) -> int:
    position = 12
    for _ in range(_MOST_PARTS):
        chunk = section.at(position, 8)
        length = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"EXIF":
            return _orientation(section.at(position + 8, length).removeprefix(b"Exif\0\0"))
        if len(chunk) < 8:
            break
        position += 8 + length + length % 2
    return 1


def _avif(section: Section) -> Header | None:
    if not brands(section) & {b"avif", b"avis"}:
        raise BrokenHeader(HEIC)
    found = avif_size(section)
    return Header(*found, _BY_PIL["AVIF"]) if found else None


def _orientation(tiff: bytes) -> int:
    """From the first directory of EXIF data; 1 where it says nothing or is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    count = struct.unpack_from(order + "H", tiff, start)[0] if start + 2 <= len(tiff) else 0
    for position in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, position)
        if tag == _ORIENTATION and kind == 3:
            return _valid(struct.unpack_from(order + "H", tiff, position + 8)[0])
    return 1


def _valid(orientation: Any) -> int:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _by_pil(section: Section) -> Header:
    section.seek(0)
    try:
        # PNG and WebP are judged above; WebP's decoder would read the whole file.
        with Image.open(section, formats=["JPEG", "BMP", "DIB", "TIFF", "PPM", "AVIF"]) as image:  # type: ignore[arg-type]
            width, height = image.size
            tiff = image.format == "TIFF"
            noted = tiff or image.format == "AVIF"
            orientation = _valid(image.getexif().get(_ORIENTATION, 1)) if noted else 1
            if tiff and orientation >= _FIRST_ON_ITS_SIDE:  # PIL turns these, and only these
                width, height = height, width
            return Header(width, height, orientation, _BY_PIL[image.format or ""])
    except Exception as error:  # what PIL raises for broken files is not limited to a few types
        if section.failure is not None:
            raise section.failure from None
        text = str(error) or type(error).__name__
        unknown = text.startswith("cannot identify image file")
        raise BrokenHeader("no known image format" if unknown else text.splitlines()[0]) from error
