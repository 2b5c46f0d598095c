"""Which files DALI decodes to PIL's pixels, told by their first and last bytes; the others it gets decoded by PIL.

The pixels of an image are what PIL makes of it (`hvd_lb.data.decode`). DALI agrees for what data sets consist of:
JPEG in grey or colour, PNG of at most 8 bits, still WebP. It differs or fails for others (CMYK without Adobe's
marker, 16-bit colour, grey with alpha in TIFF, 16 bits a pixel in BMP), and passes files that were cut short. So
whatever is not known to agree is decoded by PIL and reaches DALI as an image without compression.
"""

from __future__ import annotations

import struct

import numpy as np

from hvd_lb.data.decode import decode_image
from hvd_lb.data.images import Images

_SHORTEST = 30
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2


def as_plain(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
    """Of an image file's bytes only what DALI decodes as PIL does. BadImage; UserError as `decode_image`."""
    if plain_size(content) == (images.widths[image_id], images.heights[image_id]):
        return content
    pixels = decode_image(images, image_id, content)
    header = b"P6 %d %d 255\n" % pixels.shape[1::-1]
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.ravel()])


def plain_size(content: np.ndarray) -> tuple[int, int] | None:
    """Width and height of a whole file that DALI decodes as PIL does; None for any other."""
    data = content.data
    if len(data) < _SHORTEST:
        return None
    if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":
        return _jpeg_size(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND":
        return _png_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") == len(data) - 8:
        return _webp_size(data)
    return None


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        if _BASELINE <= data[position + 1] <= _PROGRESSIVE:
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            return (width, height) if bits == 8 and components in (1, 3) else None
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _png_size(data: memoryview) -> tuple[int, int] | None:
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return (width, height) if bits <= 8 else None


def _webp_size(data: memoryview) -> tuple[int, int] | None:
    kind = bytes(data[12:16])
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    animated = data[20] & 2
    if kind == b"VP8X" and not animated:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
