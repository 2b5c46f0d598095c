"""Of a JPEG or PNG file only what its pixels depend on, so that nothing else decides whether it can be decoded.

PIL and DALI differ in what they make of the rest: PIL refuses a PNG with more than a megabyte of text, a JPEG whose
colour profile has no number, or pictures after the first that are not where they are said to be; DALI reads past all
of these. Here the rest is left out, unread. What both look at, one rule decides: a PNG with a wrong checksum is broken.
"""

from __future__ import annotations

import struct
import zlib

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"

_PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_CHUNK, _NUMBER = struct.Struct(">I4s"), struct.Struct(">I")
_START_OF_SCAN, _JFIF, _ADOBE = 0xDA, 0xE0, 0xEE
_TABLES = {*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD}
_NOTES = {*range(0xE0, 0xF0), 0xFE}
_READ_NOTES = {_JFIF: 16, _ADOBE: 14}
"""What says how colours are stored, from this length on: decoders look at no shorter one, and PIL stumbles over it."""


def essential(content: memoryview) -> bytes | memoryview:
    """The file without what does not matter, or as it is. ValueError for a PNG with a wrong checksum."""
    if content[: len(PNG)] == PNG:
        return _png(content)
    return _jpeg(content) if content[: len(JPEG)] == JPEG else content


def _png(content: memoryview) -> bytes | memoryview:
    kept: list[memoryview] = []
    begin, start, kind = 0, len(PNG), b""
    while start + 12 <= len(content) and kind != b"IEND":
        length, kind = _CHUNK.unpack_from(content, start)
        stop = start + 12 + length
        if stop > len(content):
            break
        if zlib.crc32(content[start + 4 : stop - 4]) != _NUMBER.unpack_from(content, stop - 4)[0]:
            raise ValueError(f"wrong checksum of {kind.decode('latin-1')!r}, so it was damaged")
        if kind not in _PNG_PIXELS:
            kept.append(content[begin:start])
            begin = stop
        start = stop
    end = start if kind == b"IEND" else len(content)  # of a file that was cut short PIL says so
    return b"".join([*kept, content[begin:end]]) if kept or end < len(content) else content


def _jpeg(content: memoryview) -> bytes | memoryview:
    kept: list[bytes | memoryview] = [JPEG]
    start = len(JPEG)
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker, length = content[start + 1], int.from_bytes(content[start + 2 : start + 4], "big")
        if marker == _START_OF_SCAN:
            return b"".join([*kept, content[start:]])
        if length < 2 or marker not in _TABLES | _NOTES:
            break
        if marker in _TABLES or length >= _READ_NOTES.get(marker, length + 1):
            kept.append(content[start : start + 2 + length])
        start += 2 + length
    return content  # so unusual that PIL has to judge
