"""Headers: PIL's size for every kind of file, the orientation, and nothing but a reason for what is broken."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import SIZE, TURNS, deep_grey_files, files, turned_files, with_chunk
from PIL import Image

from hvd_lb.data.files.avif import avif_size
from hvd_lb.data.files.header import KINDS, BrokenHeader, Header, read_header
from hvd_lb.data.files.section import Section

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FILES = {**files(), **deep_grey_files()}


def header(content: bytes) -> Header:
    return read_header(Section.of_bytes(content))


def header_or_reason(content: bytes) -> Header | str:
    try:
        return header(content)
    except BrokenHeader as error:
        reason = str(error)
    assert reason
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize("kind", FILES)
def test_size_and_kind_of_every_kind_of_file(kind: str) -> None:
    found = header(FILES[kind])
    assert (found.width, found.height, found.orientation) == (*SIZE, 1)
    assert KINDS[found.kind] == kind.split()[0].strip(",").upper()


@pytest.mark.parametrize("turn", TURNS)
def test_orientation_is_noted_and_not_applied(turn: int) -> None:
    for turned, straight in turned_files(turn).values():
        assert (header(turned).width, header(turned).height, header(turned).orientation) == (*SIZE, turn)
        assert header(straight).orientation == 1


def test_a_header_far_into_the_file_is_found(tmp_path: Path) -> None:
    jpeg = files()["JPEG, 4:2:0"]
    comment = b"\xff\xfe" + struct.pack(">H", 65_535) + bytes(65_533)
    content = jpeg[:2] + comment * 20 + jpeg[2:]
    assert header(content) == header(jpeg)
    path = tmp_path / "x"
    path.write_bytes(b"before" + content + b"after")
    descriptor = os.open(path, os.O_RDONLY)
    assert read_header(Section.of_file(descriptor, 6, len(content))) == header(jpeg)
    os.close(descriptor)


@pytest.mark.parametrize("keep", [0, 1, 10, 30, 200])
@pytest.mark.parametrize(
    "kind", ["JPEG, 4:2:0", "PNG, colour", "WebP, lossy", "BMP, 24-bit", "TIFF, colour", "PPM"]
)
def test_what_ends_in_its_header_is_broken_or_has_the_right_size(kind: str, keep: int) -> None:
    found = header_or_reason(FILES[kind][:keep])
    assert isinstance(found, str) or (found.width, found.height) == SIZE


def png(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n\0\0\0\r"
        + head
        + struct.pack(">I", zlib.crc32(head))
        + bytes(4)
        + b"IDAT"
        + bytes(4)
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"text", "no known image format"),
        (b"GIF89a" + bytes(50), "GIF is not read: convert it to PNG"),
        (png(0, 5), "0 x 5 pixels"),
        (png(1 << 31, 5), "2147483648 x 5 pixels"),
        (png(5, 5)[:20] + b"x" + png(5, 5)[21:], "PNG header is damaged"),
        (b"RIFF\x40\0\0\0WEBPVP8 " + bytes(50), "WebP header is damaged"),
    ],
)
def test_what_is_broken_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(BrokenHeader, match=reason):
        header(content)


def test_claims_of_a_header_allocate_nothing() -> None:
    tracemalloc.start()
    for content in (
        png(2_000_000_000, 2_000_000_000),
        b"P6 2000000000 2000000000 255\n",
        b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + b"\xff" * 6 + bytes(30),
        b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\xff\xff\xff\x7f\x08\0\0\0" + bytes(8),
        b"\x89PNG\r\n\x1a\n" + png(5, 5)[8:33] + b"\x7f\xff\xff\xffeXIf" + bytes(40),
    ):
        with contextlib.suppress(BrokenHeader):
            header(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.slow
@given(st.data(), st.sampled_from(sorted(FILES)))
@settings(max_examples=400)
def test_any_damage_gives_a_header_or_a_reason(data: st.DataObject, kind: str) -> None:
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 700) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)))])
    found = header_or_reason(damaged)
    if not isinstance(found, str):
        assert min(found.width, found.height) > 0
        with contextlib.suppress(Exception), Image.open(io.BytesIO(damaged)) as image:
            sides = {found.width, found.height}  # PIL turns TIFF
            assert image.size == (found.width, found.height) or (
                image.format == "TIFF" and set(image.size) == sides
            )


def test_an_error_of_the_file_system_is_not_taken_for_a_broken_file() -> None:
    def fails(count: int, position: int) -> bytes:
        if position:
            raise OSError(5, "Input/output error")
        return b"\xff\xd8" + bytes(count - 2)

    section = Section(fails, 1_000_000)
    section.at(0, 4096)
    for content in (Section(lambda count, position: fails(count, 1), 100), section):
        with pytest.raises((OSError, BrokenHeader)) as raised:
            read_header(content)
        assert content.failure is None or raised.value is content.failure


def test_a_section_reads_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    Image.new("RGB", (7, 5)).save(path, "BMP")
    content = path.read_bytes()
    section = Section.of_bytes(content)
    with path.open("rb") as file:
        for action in (lambda f: f.read(3), lambda f: f.seek(-2, 1), lambda f: f.read(), lambda f: f.read(5),
                       lambda f: f.seek(-4, 2), lambda f: f.read(99), lambda f: f.tell(), lambda f: f.seek(500),
                       lambda f: f.read(1)):  # fmt: skip
            assert action(section) == action(file)


def test_avif_is_measured_without_pil_except_for_sequences() -> None:
    for kind, content in FILES.items():
        if kind.startswith("AVIF"):
            found = avif_size(Section.of_bytes(content))
            assert found == (None if kind == "AVIF, several frames" else (*SIZE, 1))


@pytest.mark.slow
def test_damaged_avif_has_the_size_that_pil_says_if_any() -> None:
    draw = random.Random(0)
    stills = [FILES[kind] for kind in FILES if kind.startswith("AVIF") and "frames" not in kind]
    stills += [turned_files(turn)["AVIF {}"][0] for turn in TURNS]
    compared = 0
    for _ in range(2000):
        content = bytearray(draw.choice(stills))
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(400)] = draw.choice([0, 1, 255, draw.randrange(256)])
        found = avif_size(Section.of_bytes(bytes(content)))
        said = None
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=["AVIF"]) as image:
            said = (*image.size, image.getexif().get(274, 1))
        if found and said:
            assert found == said
            compared += 1
    assert compared > 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GIF89a" + bytes(40), "GIF is not read: convert it to PNG"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
            "HEIC is not read: convert it to JPEG, PNG or AVIF",
        ),
        (
            b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40),
            "HEIC is not read: convert it to JPEG, PNG or AVIF",
        ),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000 is not read: convert it to PNG or JPEG"),
        (b"\xff\x4f\xff\x51" + bytes(40), "JPEG 2000 is not read: convert it to PNG or JPEG"),
        (b"\xff\x0a" + bytes(40), "JPEG XL is not read: convert it to PNG, or back to JPEG with djxl"),
        (
            b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40),
            "JPEG XL is not read: convert it to PNG, or back to JPEG with djxl",
        ),
    ],
)
def test_what_is_not_read_has_its_name(content: bytes, reason: str) -> None:
    assert header_or_reason(content) == reason


def test_a_png_with_thousands_of_chunks_before_its_data_has_a_size() -> None:
    content = FILES["PNG, colour"]
    assert header(content[:33] + with_chunk(content, b"tEXt", b"x")[33:46] * 2000 + content[33:])[:2] == SIZE
