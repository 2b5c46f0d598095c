"""Which files DALI decodes to PIL's pixels, told by their structure; the others it gets decoded by PIL.

The pixels of an image are what PIL makes of it (`decode`). DALI agrees for what data sets consist of:
JPEG in grey or colour, PNG of at most 8 bits, still WebP. It differs or fails for others (CMYK without Adobe's
marker, 16-bit colour, grey with alpha in TIFF, 16 bits a pixel in BMP), and passes files that were cut short. So
whatever is not known to agree is decoded by PIL and reaches DALI as an image without compression.

Above all DALI must not see a file whose headers it cannot follow: one in a batch of 32 ends the process with SIGSEGV
(DALI 2.4.0). It looks at JPEG up to the image data and at every chunk of PNG, and so does this.
"""

from __future__ import annotations

import struct

import numpy as np

from hvd_lb.data.decoding.decode import BadImage, decode_image
from hvd_lb.data.decoding.essential import JPEG, PNG, essential
from hvd_lb.data.images import Images

_SHORTEST = 30
_EXIF, _RESTART, _END, _START_OF_SCAN = 0xE1, 0xD0, 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_READ_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_PROGRESSIVE = 0xC2
_HEADER_MARKERS = {*range(0xC0, 0xD0), *range(0xDA, 0xFF)}
# PNG: which bits a level may have, of those that DALI decodes as PIL does, by the type of colour.
_PNG_BITS = {0: {1, 2, 4, 8}, 2: {8}, 3: {1, 2, 4, 8}, 4: {8}, 6: {8}}
_WEBP_FLAGS = 0x20 | 0x10 | 0x04  # a colour profile, alpha, XMP; not EXIF, animation and what is reserved
_WEBP_CHUNKS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ICCP", b"XMP "}


def as_plain(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
    """Of an image file's bytes only what DALI decodes as PIL does. BadImage; UserError as `decode_image`."""
    plain = content
    if content.data[: len(PNG)] == PNG:  # DALI reads its other chunks, too: animations, profiles, text
        try:
            plain = np.frombuffer(essential(content.data), np.uint8)
        except ValueError as error:
            raise BadImage(images.name(image_id), str(error)) from error
    if plain_size(plain) == (images.widths[image_id], images.heights[image_id]):
        return plain
    return as_pixels(images, image_id, content)


def as_pixels(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
    """What PIL makes of an image file, as one without compression. BadImage; UserError as `decode_image`."""
    pixels = decode_image(images, image_id, content)
    header = b"P6 %d %d 255\n" % pixels.shape[1::-1]
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.ravel()])


def plain_size(content: np.ndarray) -> tuple[int, int] | None:
    """Width and height of a whole file that DALI decodes as PIL does; None for any other."""
    data = content.data
    if len(data) < _SHORTEST:
        return None
    if data[:2] == JPEG and data[-2:] == b"\xff\xd9":
        return _jpeg_size(content)
    if data[:8] == PNG and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND":
        return _png_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") == len(data) - 8:
        return _webp_size(data)
    return None


def _jpeg_size(content: np.ndarray) -> tuple[int, int] | None:
    data, position, size, several_scans = content.data, 2, None, False
    while position + 10 <= len(data) and data[position] == 0xFF and data[position + 1] in _HEADER_MARKERS:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _START_OF_SCAN:
            return size if several_scans or _one_scan(content, position) else None
        if length < (8 if marker == _EXIF else 2):
            return None
        if marker in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            if size or marker not in _READ_FRAMES or bits != 8 or components not in (1, 3):
                return None
            size, several_scans = (width, height), marker == _PROGRESSIVE
        position += 2 + length
    return None


def _one_scan(content: np.ndarray, start: int) -> bool:
    """Whether nothing but restart markers lies between the only scan, which begins at `start`, and the end of a file.

    PIL reads on to the end, where DALI stops at the last row it needs, and an unknown marker is an error. Files of
    several scans both read whole before they decode.
    """
    scan = content[start + 2 :]
    markers = scan[1:][(scan[:-1] == 0xFF) & (scan[1:] != 0)]
    return markers[-1:].tolist() == [_END] and bool(((markers[:-1] & 0xF8) == _RESTART).all())


def _png_size(data: memoryview) -> tuple[int, int] | None:
    position, kind = len(PNG), b""
    while position + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        if (kind == b"IHDR") != (position == len(PNG)):
            return None
        position += 12 + length
    if position != len(data) or data[8:12] != b"\0\0\0\r":
        return None
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    return (width, height) if bits in _PNG_BITS.get(colour, ()) else None


def _webp_size(data: memoryview) -> tuple[int, int] | None:
    kind, position = bytes(data[12:16]), 12
    while position + 8 <= len(data) and bytes(data[position : position + 4]) in _WEBP_CHUNKS:
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    if position != len(data):
        return None
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and not data[20] & ~_WEBP_FLAGS:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
