"""What pixels do not depend on is left out, unread; nothing else is, and a wrong checksum is told."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from broken import good_file
from image_files import as_pil_converts_it, deep_grey_files, files, with_chunk, with_segments
from PIL import Image

from hvd_lb.data.decoding.essential import essential

FILES = {**files(), **deep_grey_files()}


def left(content: bytes) -> bytes:
    return bytes(essential(memoryview(content)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FILES)
def test_the_pixels_stay(kind: str) -> None:
    content = FILES[kind]
    np.testing.assert_array_equal(as_pil_converts_it(left(content)), as_pil_converts_it(content))
    assert len(left(content)) <= len(content)


def test_notes_are_left_out() -> None:
    jpeg, png = FILES["JPEG, 4:2:0"], FILES["PNG, colour"]
    notes = [(marker, b"Exif\0\0" + bytes(40)) for marker in (0xE1, 0xE2, 0xED, 0xEF, 0xFE)]
    assert left(with_segments(jpeg, notes)) == left(jpeg) == jpeg
    for kind in (b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"tRNS", b"gAMA", b"teSt", b"TEST"):
        assert left(with_chunk(png, kind, b"anything")) == left(png) == png
    assert left(with_chunk(png, b"tEXt", b"late", before=b"IEND")) == png
    assert left(png + b"more") == png


def test_how_colours_are_stored_is_kept() -> None:
    jpeg = FILES["JPEG, 4:2:0"]
    adobe = with_segments(jpeg, [(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 1))])
    assert left(adobe) == adobe
    assert left(with_segments(jpeg, [(0xEE, b"Adobe\0\1\0"), (0xE0, b"JFIF\0\1")])) == jpeg
    palette = FILES["PNG, palette"]
    assert left(palette) == palette


@pytest.mark.parametrize("keep", [8, 20, 33, 60, 200, -40])
def test_what_was_cut_short_stays_so(keep: int) -> None:
    for kind in ("PNG", "JPEG"):
        content = good_file(kind, 3)
        content = with_chunk(content, b"tEXt", b"text" * 5) if kind == "PNG" else content
        with pytest.raises((OSError, SyntaxError)), Image.open(io.BytesIO(left(content[:keep]))) as image:
            image.load()


def test_a_wrong_checksum_is_told() -> None:
    png = with_chunk(FILES["PNG, colour"], b"tEXt", b"text")
    for kind in (b"IHDR", b"tEXt", b"IDAT", b"IEND"):
        at = png.index(kind)
        end = at + 4 + int.from_bytes(png[at - 4 : at], "big")
        wrong = png[:end] + struct.pack(">I", zlib.crc32(png[at:end]) ^ 1) + png[end + 4 :]
        with pytest.raises(ValueError, match=f"wrong checksum of '{kind.decode()}'"):
            left(wrong)
