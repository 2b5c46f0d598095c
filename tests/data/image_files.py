"""Pictures, and one of them, 40 × 30 pixels, in every kind of file, also those PIL reads but cannot write."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageCms


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise with a little grain, like a photograph to a codec."""
    rng = np.random.default_rng((seed, width, height))
    coarse = rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + rng.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8))


SIZE = (40, 30)
TURNS = range(2, 9)
_WIDTH, _HEIGHT = SIZE
_COLOUR = photo(*SIZE)
_OTHER = photo(*SIZE, seed=1)
_GREY = _COLOUR.convert("L")
_BITS = _COLOUR.convert("1")
_PALETTE = _COLOUR.quantize(64)
_COLOUR_ALPHA, _GREY_ALPHA = _COLOUR.convert("RGBA"), _GREY.convert("LA")
for _image in (_COLOUR_ALPHA, _GREY_ALPHA):
    _image.putalpha(_OTHER.convert("L"))
_DEEP = np.random.default_rng(0).integers(0, 65536, (_HEIGHT, _WIDTH, 4), dtype=np.uint16)
_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
_CLEAR_COLOUR = _COLOUR.getpixel((20, 15))

GREY_LEVELS = _DEEP[..., 0]
"""16 bits a pixel, the levels of `deep_grey_files`."""


def as_pil_converts_it(content: bytes) -> np.ndarray:
    """uint8 (height, width, 3)."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def files() -> dict[str, bytes]:
    """By kind; the pixels of all are those of `as_pil_converts_it`."""
    return {**_png(), **_jpeg(), **_webp(), **_bmp(), **_tiff(), **_pnm(), **_avif()}


def deep_grey_files() -> dict[str, bytes]:
    """`GREY_LEVELS` by kind, where PIL would cut off at 255."""
    return {
        "PNG, 16-bit grey": _png_file(16, 0, GREY_LEVELS.astype(">u2").tobytes()),
        "PNG, 16-bit grey, one transparent": _png_file(
            16,
            0,
            GREY_LEVELS.astype(">u2").tobytes(),
            _chunk(b"tRNS", GREY_LEVELS[:1, :1].astype(">u2").tobytes()),
        ),
        "TIFF, 16-bit grey": save(Image.fromarray(GREY_LEVELS), "TIFF"),
        "TIFF, 12-bit grey": _tiff_of(12, 1, _twelve_bits(GREY_LEVELS >> 4)),
        "TIFF, 16-bit grey, 0 is white": _tiff_of(16, 0, (65535 - GREY_LEVELS).astype("<u2").tobytes()),
        "TIFF, 16-bit grey, LZW": save(Image.fromarray(GREY_LEVELS), "TIFF", compression="tiff_lzw"),
        "PPM, 16-bit grey": b"P5 %d %d 65535\n" % SIZE + GREY_LEVELS.astype(">u2").tobytes(),
    }


def turned_files(turn: int) -> dict[str, tuple[bytes, bytes]]:
    """By kind: a file whose EXIF orientation is `turn`, and the same without it."""
    kinds = [
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {}),
        ("AVIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ]
    return {
        f"{kind} {options}": (
            save(_COLOUR, kind, exif=_exif(turn), **options),
            save(_COLOUR, kind, **options),
        )
        for kind, options in kinds
    }


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # what one format leaves in an image can disturb the next
    return file.getvalue()


def with_chunk(png: bytes, kind: bytes, data: bytes, before: bytes = b"IDAT") -> bytes:
    """A PNG file with one chunk more, right checksum and all."""
    if before not in png:
        before = b"IDAT"
    at = (png.index(before) if before == b"IDAT" else png.rindex(before)) - 4
    return png[:at] + _chunk(kind, data) + png[at:]


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 8 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def with_segments(jpeg: bytes, segments: list[tuple[int, bytes]]) -> bytes:
    """A JPEG file with segments more, by marker, behind its first one."""
    at = 4 + int.from_bytes(jpeg[4:6], "big")
    made = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments
    )
    return jpeg[:at] + made + jpeg[at:]


def _frames() -> dict[str, object]:
    return {"save_all": True, "append_images": [_OTHER.copy()]}


def _png() -> dict[str, bytes]:
    deep = _DEEP.astype(">u2")
    clear = _chunk(b"tRNS", _DEEP[0, 0, :3].astype(">u2").tobytes())
    saved = {
        "grey": (_GREY, {}),
        "colour": (_COLOUR, {}),
        "palette": (_PALETTE, {}),
        "palette of 16": (_COLOUR.quantize(16), {"bits": 4}),
        "palette of 2": (_COLOUR.quantize(2), {"bits": 1}),
        "palette, one transparent": (_PALETTE, {"transparency": 3}),
        "palette, each with alpha": (_PALETTE, {"transparency": bytes(range(64))}),
        "grey, one transparent": (_GREY, {"transparency": 100}),
        "colour, one transparent": (_COLOUR, {"transparency": _CLEAR_COLOUR}),
        "colour and alpha": (_COLOUR_ALPHA, {}),
        "grey and alpha": (_GREY_ALPHA, {}),
        "1-bit": (_BITS, {}),
        "1-bit, one transparent": (_BITS, {"transparency": 1}),
        "colour profile": (_COLOUR, {"icc_profile": _PROFILE}),
        "several frames": (_COLOUR, _frames()),
    }
    return {
        **{f"PNG, {kind}": save(image, "PNG", **options) for kind, (image, options) in saved.items()},
        "PNG, 4-bit grey": _png_file(4, 0, (np.asarray(_GREY)[:, ::2] & 0xF0).tobytes()),
        "PNG, interlaced": _interlaced(np.asarray(_COLOUR)),
        "PNG, gamma": _png_file(
            8, 2, np.asarray(_COLOUR).tobytes(), _chunk(b"gAMA", struct.pack(">I", 100_000))
        ),
        "PNG, 16-bit grey and alpha": _png_file(16, 4, deep[..., :2].tobytes()),
        "PNG, 16-bit colour": _png_file(16, 2, deep[..., :3].tobytes()),
        "PNG, 16-bit colour, one transparent": _png_file(16, 2, deep[..., :3].tobytes(), clear),
        "PNG, 16-bit colour and alpha": _png_file(16, 6, deep.tobytes()),
        "PNG, more bytes after it": save(_COLOUR, "PNG") + bytes(50),
        "PNG without its end": save(_COLOUR, "PNG")[:-12],
    }


def _jpeg() -> dict[str, bytes]:
    saved = {
        "4:2:0": (_COLOUR, {}),
        "4:2:2": (_COLOUR, {"subsampling": "4:2:2"}),
        "4:4:4": (_COLOUR, {"subsampling": "4:4:4"}),
        "grey": (_GREY, {}),
        "progressive": (_COLOUR, {"progressive": True}),
        "progressive grey": (_GREY, {"progressive": True}),
        "restart markers": (_COLOUR, {"restart_marker_blocks": 2}),
        "RGB": (_COLOUR, {"keep_rgb": True}),
        "colour profile": (_COLOUR, {"icc_profile": _PROFILE}),
        "CMYK": (_COLOUR.convert("CMYK"), {}),
        "progressive CMYK": (_COLOUR.convert("CMYK"), {"progressive": True}),
    }
    cmyk = save(_COLOUR.convert("CMYK"), "JPEG", subsampling="4:4:4")
    adobe = cmyk.index(b"\xff\xee\x00\x0eAdobe")
    transform = adobe + 15
    return {
        **{f"JPEG, {kind}": save(image, "JPEG", **options) for kind, (image, options) in saved.items()},
        "JPEG, YCCK": cmyk[:transform] + b"\x02" + cmyk[transform + 1 :],
        "JPEG, CMYK without Adobe's marker": cmyk[:adobe] + cmyk[adobe + 16 :],
        "JPEG, RGB by Adobe's marker": _with_adobe(save(_COLOUR, "JPEG", subsampling="4:4:4"), 0),
        "JPEG, YCbCr by Adobe's marker": _with_adobe(save(_COLOUR, "JPEG"), 1),
        "JPEG, more bytes after it": save(_COLOUR, "JPEG") + bytes(50),
        "JPEG, several pictures": save(_COLOUR, "MPO", **_frames()),
    }


def _webp() -> dict[str, bytes]:
    saved = {
        "lossy": (_COLOUR, {}),
        "lossless": (_COLOUR, {"lossless": True}),
        "lossy with alpha": (_COLOUR_ALPHA, {}),
        "lossless with alpha": (_COLOUR_ALPHA, {"lossless": True}),
        "lossless, colours under alpha": (_COLOUR_ALPHA, {"lossless": True, "exact": True}),
        "colour profile": (_COLOUR, {"icc_profile": _PROFILE}),
        "animated": (_COLOUR_ALPHA, _frames()),
    }
    return {f"WebP, {kind}": save(image, "WEBP", **options) for kind, (image, options) in saved.items()}


def _avif() -> dict[str, bytes]:
    saved = {
        "4:2:0": (_COLOUR, {}),
        "4:4:4": (_COLOUR, {"subsampling": "4:4:4", "range": "limited"}),
        "grey": (_GREY, {}),
        "with alpha": (_COLOUR_ALPHA, {}),
        "premultiplied alpha": (_COLOUR_ALPHA, {"alpha_premultiplied": True}),
        "colour profile and EXIF": (_COLOUR, {"icc_profile": _PROFILE, "exif": _exif(1)}),
        "several frames": (_COLOUR, _frames()),
    }
    return {f"AVIF, {kind}": save(image, "AVIF", **options) for kind, (image, options) in saved.items()}


def _exif(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274], exif[305] = turn, "software"
    return exif


def _bmp() -> dict[str, bytes]:
    saved = {"24-bit": _COLOUR, "palette": _PALETTE, "grey": _GREY, "1-bit": _BITS, "32-bit": _COLOUR_ALPHA}
    red, green, blue = (np.asarray(_COLOUR)[::-1, :, channel].astype(np.uint16) >> 3 for channel in range(3))
    rows = (red << 10 | green << 5 | blue).astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, *SIZE, 1, 16, 0, len(rows), 0, 0, 0, 0)
    return {
        **{f"BMP, {kind}": save(image, "BMP") for kind, image in saved.items()},
        "BMP, 16-bit": b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows,
    }


def _tiff() -> dict[str, bytes]:
    saved = {
        "colour": (_COLOUR, {}),
        "LZW": (_COLOUR, {"compression": "tiff_lzw"}),
        "JPEG": (_COLOUR, {"compression": "jpeg"}),
        "grey": (_GREY, {}),
        "grey and alpha": (_GREY_ALPHA, {}),
        "colour and alpha": (_COLOUR_ALPHA, {}),
        "palette": (_PALETTE, {}),
        "1-bit": (_BITS, {}),
        "fax": (_BITS, {"compression": "group4"}),
        "CMYK": (_COLOUR.convert("CMYK"), {}),
        "YCbCr": (_COLOUR.convert("YCbCr"), {}),
        "32-bit integers": (_GREY.convert("I"), {}),
        "floating point": (_GREY.convert("F"), {}),
        "several pages": (_COLOUR, _frames()),
    }
    return {f"TIFF, {kind}": save(image, "TIFF", **options) for kind, (image, options) in saved.items()}


def _twelve_bits(levels: np.ndarray) -> bytes:
    """Levels up to 4095, two in three bytes, as microscopes and scanners write them."""
    first, second = levels[:, ::2], levels[:, 1::2]
    return (
        np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
        .astype(np.uint8)
        .tobytes()
    )


def _tiff_of(bits: int, photometric: int, rows: bytes) -> bytes:
    tags = [(256, _WIDTH), (257, _HEIGHT), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1)]
    tags += [(278, _HEIGHT), (279, len(rows))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rows


def _pnm() -> dict[str, bytes]:
    return {
        "PPM": save(_COLOUR, "PPM"),
        "PPM, grey": save(_GREY, "PPM"),
        "PPM, 1-bit": save(_BITS, "PPM"),
        "PPM, levels to 100": b"P6 %d %d 100\n" % SIZE + (np.asarray(_COLOUR) // 3).tobytes(),
        "PPM, 16-bit": b"P6 %d %d 65535\n" % SIZE + _DEEP[..., :3].astype(">u2").tobytes(),
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_file(bits: int, colour: int, rows: bytes, more: bytes = b"") -> bytes:
    stride = len(rows) // _HEIGHT
    filtered = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride))
    return _png_parts(bits, colour, 0, more, filtered)


def _png_parts(bits: int, colour: int, interlaced: int, more: bytes, filtered: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", *SIZE, bits, colour, 0, 0, interlaced)
    end = _chunk(b"IDAT", zlib.compress(filtered)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + more + end


def _interlaced(pixels: np.ndarray) -> bytes:
    """Adam7."""
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    filtered = b"".join(
        b"\0" + row.tobytes() for x, y, step_x, step_y in passes for row in pixels[y::step_y, x::step_x]
    )
    return _png_parts(8, 2, 1, b"", filtered)


def _with_adobe(jpeg: bytes, transform: int) -> bytes:
    return jpeg[:2] + b"\xff\xee\x00\x0eAdobe" + struct.pack(">HHHB", 100, 0, 0, transform) + jpeg[2:]
