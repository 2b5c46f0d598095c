"""Just enough of MATLAB's level 5 MAT-file format to read an array of structs, as ImageNet's devkit has one.

Format: "MAT-File Format", The MathWorks. A file is a header and data elements; an element is a tag (type,
size) and data, padded to 8 bytes; a matrix is an element of elements; any may be compressed with zlib.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

Field = str | np.ndarray

_HEADER_BYTES = 128
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-{}", 16: "utf-8", 17: "utf-16-{}"}
_MATRIX, _COMPRESSED = 14, 15
_STRUCT_CLASS, _CHAR_CLASS = 2, 4


def read_structs(content: bytes) -> list[dict[str, Field]]:
    """The elements of the first array of structs in a MAT-file: text as str, numbers as flat arrays.

    ValueError for anything else.
    """
    try:
        order = {b"IM": "<", b"MI": ">"}[content[_HEADER_BYTES - 2 : _HEADER_BYTES]]
        for kind, data in _elements(content[_HEADER_BYTES:], order):
            if kind == _MATRIX and isinstance(value := _matrix(data, order), list):
                return value
    except (KeyError, IndexError, StopIteration, struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"no MAT-file of level 5 ({type(error).__name__})") from error
    raise ValueError("no array of structs in the MAT-file")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each element; compressed ones are unpacked."""
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        if kind >> 16:  # small: type and size share the first word, the data is in the second
            kind, size = kind & 0xFFFF, kind >> 16
            yield kind, data[position + 4 : position + 4 + size]
            position += 8
            continue
        start = position + 8
        if start + size > len(data):
            raise ValueError("the MAT-file is cut off")
        if kind == _COMPRESSED:
            yield from _elements(zlib.decompress(data[start : start + size]), order)
            position = start + size
        else:
            yield kind, data[start : start + size]
            position = start + size + -size % 8


def _matrix(data: bytes, order: str) -> list[dict[str, Field]] | Field:
    parts = _elements(data, order)
    if not data:
        return np.empty(0)
    flags, dimensions, _name = (next(parts)[1] for _ in range(3))
    array_class = struct.unpack_from(f"{order}I", flags)[0] & 0xFF
    if array_class == _STRUCT_CLASS:
        return _structs(parts, int(np.prod(np.frombuffer(dimensions, f"{order}i4"))), order)
    kind, values = next(parts, (1, b""))
    if array_class == _CHAR_CLASS:
        return values.decode(_TEXTS[kind].format({"<": "le", ">": "be"}[order]))
    return np.frombuffer(values, order + _NUMBERS[kind]) if kind in _NUMBERS else np.empty(0)


def _structs(parts: Iterator[tuple[int, bytes]], count: int, order: str) -> list[dict[str, Field]]:
    """Field names in slots of one length, then every field of every struct as a matrix."""
    slot = struct.unpack(f"{order}i", next(parts)[1])[0]
    packed = next(parts)[1]
    names = [
        packed[start : start + slot].split(b"\0")[0].decode("ascii") for start in range(0, len(packed), slot)
    ]
    structs: list[dict[str, Field]] = []
    for _ in range(count):
        fields = {}
        for name in names:
            value = _matrix(next(parts)[1], order)
            fields[name] = np.empty(0) if isinstance(value, list) else value
        structs.append(fields)
    return structs
