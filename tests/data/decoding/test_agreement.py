"""Both loaders on odd files: the same images are bad, and the others have the same pixels, whichever their window."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from image_files import chunks_of, files, photo, png_of, save, with_chunk, with_segments
from loader_cases import CPU, KINDS, BlobImages, as_levels
from nvidia.dali.pipeline import Pipeline

from hvd_lb.data.decoding import decode, plain
from hvd_lb.data.decoding.stand_in import StandIn
from hvd_lb.data.files.header import BrokenHeader, read_header
from hvd_lb.data.files.section import Section
from hvd_lb.data.loading import dali
from hvd_lb.data.loading.open import open_loader
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch, Windows

SIDE, BATCH = 16, 32
FILES = files()


def size_of(content: bytes) -> tuple[int, int]:
    try:
        return read_header(Section.of_bytes(content))[:2]
    except BrokenHeader:
        return 0, 0


def images_of(contents: list[bytes]) -> BlobImages:
    """With a whole one after them, which can stand in."""
    contents = [*contents, save(photo(40, 30), "PNG")]
    return BlobImages([np.frombuffer(of, np.uint8) for of in contents], [size_of(of) for of in contents])


def load(kind: str, contents: list[bytes], part: int = 1) -> tuple[dict[int, str], torch.Tensor]:
    """Why images are bad, and the windows of all: as large as the image by `part`, from its corner."""
    images = images_of(contents)

    def draw(ids: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> Windows:
        zeros = np.zeros(len(ids), np.int32)
        shape = (np.maximum(sides // part, 1).astype(np.int32) for sides in (widths, heights))
        return Windows(zeros, zeros.copy(), *shape)

    batches = []
    for start in range(0, len(contents), BATCH):
        ids = np.arange(start, min(start + BATCH, len(contents)))
        batches.append(Microbatch(ids, draw(ids, images.widths[ids], images.heights[ids]), None, draw))
    told: list[StandIn] = []
    with open_loader(
        kind,
        images,
        batches,
        as_levels(SIDE),
        batch_size=BATCH,
        device=CPU,
        threads=2,
        on_stand_ins=told.extend,
        max_pixels=20_000_000,
    ) as loader:
        windows = torch.cat([x.clone() for x, _ in loader])
    return {of.image: of.reason for of in told}, windows


def agree(contents: list[bytes]) -> dict[int, str]:
    """The bad ones."""
    for part in (1, 3):
        (ours, theirs), (mine, yours) = zip(*(load(kind, contents, part) for kind in KINDS), strict=True)
        assert ours.keys() == theirs.keys()
        assert torch.equal(mine, yours)
    return ours


def with_notes(draw: random.Random) -> bytes:
    """A JPEG with application segments that begin as usual ones do, and go on at random."""
    heads = (b"JFIF\0", b"Exif\0\0II*\0", b"ICC_PROFILE\0", b"ICC_PROFILE\0\1\1", b"MPF\0", b"Adobe", b"AVI1")
    heads = (*heads, b"Photoshop 3.0\0008BIM", b"")
    segments = [
        (
            draw.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE]),
            draw.choice(heads) + draw.randbytes(draw.choice([0, 1, 3, 9, 40])),
        )
        for _ in range(draw.randint(1, 3))
    ]
    return with_segments(save(photo(48, 40, draw.randrange(9)), "JPEG"), segments)


def with_other_chunks(draw: random.Random) -> bytes:
    png = FILES[draw.choice([kind for kind in FILES if kind.startswith("PNG")])]
    kinds = (
        b"tEXt zTXt iTXt iCCP gAMA cHRM sRGB sBIT bKGD hIST tRNS sPLT eXIf acTL fcTL fdAT cICP teSt TEST IHDR"
    )
    for _ in range(2):
        kind = draw.choice(kinds.split())
        data = draw.choice(
            [draw.randbytes(draw.choice([0, 1, 6, 26])), b"x\0\0" + zlib.compress(bytes(3_000_000))]
        )
        png = with_chunk(png, kind, data, before=draw.choice([b"IDAT", b"IEND"]))
    return png


def with_other_data(draw: random.Random) -> bytes:
    """A PNG whose checksums are right, but not its image data, palette or header."""
    png = FILES[draw.choice([kind for kind in FILES if kind.startswith("PNG") and "without" not in kind])]
    chunks = chunks_of(png)
    data = bytearray(zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT")))
    way = draw.choice(["filter", "cut", "more", "zlib", "palette", "header", "as it was"])
    if way == "filter":
        data[0] = draw.choice([1, 4, 5, 200])
    elif way == "cut":
        data = data[: draw.randrange(len(data))]
    elif way == "more":
        data += draw.randbytes(100)
    packed = bytearray(zlib.compress(data))
    if way == "zlib":
        packed[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
    made = [(kind, content) for kind, content in chunks if kind != b"IDAT"]
    if way == "palette":
        made = [
            (kind, content[: 3 * draw.randint(0, 2)] if kind == b"PLTE" else content)
            for kind, content in made
        ]
    if way == "header":
        header = bytearray(made[0][1])
        header[draw.choice([3, 8, 9, 10, 11, 12])] = draw.choice([0, 1, 2, 3, 6, 16])
        made[0] = b"IHDR", bytes(header)
    return png_of([*made[:-1], (b"IDAT", bytes(packed)), made[-1]])


def damaged_jpeg(draw: random.Random) -> bytes:
    """Bytes changed, left out or put in behind the header; the end is in its place."""
    kinds = [kind for kind in FILES if kind.startswith("JPEG")]
    content = bytearray(FILES[draw.choice(kinds)])
    start = content.index(b"\xff\xda") + 14
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(start, len(content) - 2)
        way = draw.randrange(4)
        if way == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            content[at : at + 2] = bytes([0xFF, draw.randrange(256)])
        elif way == 2 and len(content) > start + 100:
            del content[at : at + draw.randint(1, 30)]
        else:
            content[at:at] = draw.randbytes(draw.randint(1, 20))
    return bytes(content) if content.endswith(b"\xff\xd9") else bytes(content + b"\xff\xd9")


def with_missing_scans(draw: random.Random) -> bytes:
    content = save(photo(64, 64, draw.randrange(99)), "JPEG", progressive=True)
    scans = [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]
    return content[: draw.choice(scans[1:])] + b"\xff\xd9"


def with_other_sampling(draw: random.Random) -> bytes:
    content = bytearray(save(photo(64, 64, draw.randrange(99)), "JPEG", subsampling="4:4:4"))
    frame = content.index(b"\xff\xc0")
    for component in range(3):
        content[frame + 11 + 3 * component] = draw.choice([0x11, 0x12, 0x21, 0x22, 0x41, 0x14])
    return bytes(content)


def damaged_webp(draw: random.Random) -> bytes:
    content = bytearray(FILES[draw.choice([kind for kind in FILES if kind.startswith("WebP")])])
    for _ in range(draw.randint(1, 2)):
        content[draw.randrange(12, draw.choice([60, len(content)]))] ^= 1 << draw.randrange(8)
    return bytes(content[:4] + struct.pack("<I", len(content) - 8) + content[8:])


def damaged_avif(draw: random.Random) -> bytes:
    content = bytearray(FILES[draw.choice([kind for kind in FILES if kind.startswith("AVIF")])])
    for _ in range(draw.randint(1, 2)):
        content[draw.randrange(8, len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


WAYS: dict[Callable[[random.Random], bytes], bool] = {
    with_notes: False,
    with_other_chunks: True,
    with_other_data: True,
    damaged_jpeg: True,
    with_missing_scans: False,
    with_other_sampling: True,
    damaged_webp: True,
    damaged_avif: True,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_on_odd_files_both_loaders_agree(way: Callable[[random.Random], bytes]) -> None:
    draw = random.Random(way.__name__)
    bad = agree([way(draw) for _ in range(150)])
    assert bool(bad) == WAYS[way]
    assert len(bad) < 150


BOMB = b"Comment\0\0" + zlib.compress(bytes(30_000_000))
LONG = {
    "text": [(b"tEXt", b"Comment\0" + b"a" * 9_000_000)],
    "compressed text": [(b"zTXt", BOMB)],
    "international text": [(b"iTXt", b"Comment\0\1\0\0\0" + BOMB[9:])],
    "much text": [(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 1_000_000))] * 80,
    "colour profile": [(b"iCCP", b"icc\0\0" + BOMB[9:])],
    "no colour profile": [(b"iCCP", b"icc\0\0no zlib")],
    "animation without frames": [(b"acTL", bytes(8))],
    "animation of no bytes": [(b"acTL", b"")],
    "broken EXIF": [(b"eXIf", b"MM")],
}


@pytest.mark.parametrize("kind", LONG)
def test_an_intact_png_is_good_whatever_else_it_holds(kind: str) -> None:
    content = FILES["PNG, colour"]
    for name, data in LONG[kind]:
        content = with_chunk(content, name, data)
    late = with_chunk(FILES["PNG, colour"], *LONG[kind][0], before=b"IEND")
    for loader in KINDS:
        bad, windows = load(loader, [content, FILES["PNG, colour"], late])
        assert not bad
        assert torch.equal(windows[0], windows[1])
        assert torch.equal(windows[2], windows[1])


ICC, EXIF = b"ICC_PROFILE\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
NOTES = {
    "colour profile without a number": [(0xE2, ICC)],
    "large EXIF": [(0xE1, EXIF + bytes(60_000))] * 20,
    "broken EXIF": [(0xE1, EXIF)],
    "no table of pictures": [(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")],
    "short JFIF": [(0xE0, b"JFIF\0\1")],
    "short Adobe": [(0xEE, b"Adobe\0")],
    "comments": [(0xFE, bytes(65_000))] * 30,
}


@pytest.mark.parametrize("kind", NOTES)
def test_an_intact_jpeg_is_good_whatever_is_noted_in_it(kind: str) -> None:
    jpeg = FILES["JPEG, 4:2:0"]
    for loader in KINDS:
        bad, windows = load(loader, [with_segments(jpeg, NOTES[kind]), jpeg])
        assert not bad
        assert torch.equal(windows[0], windows[1])


def with_wrong_checksum(png: bytes) -> bytes:
    """Of image data, which DALI refuses and PIL does not look at; it is kept from both unless `pipelines` is used."""
    at = png.rindex(b"IDAT")
    end = at + 4 + int.from_bytes(png[at - 4 : at], "big")
    return png[:end] + bytes(4) + png[end + 4 :]


REFUSED = with_wrong_checksum(FILES["PNG, palette"])


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[Pipeline]:
    """Those that are made, where nobody looks at checksums before DALI does."""
    made: list[Pipeline] = []
    original = Pipeline.__init__

    def count(self: Pipeline, *arguments: object, **options: object) -> None:
        made.append(self)
        original(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__init__", count)
    for module in (plain, decode):
        monkeypatch.setattr(module, "essential", lambda content: content)
    return made


def test_what_dali_refuses_is_what_pil_makes_of_it(pipelines: list[Pipeline]) -> None:
    good = [FILES["JPEG, 4:2:0"], FILES["PNG, colour"]] * 16
    contents = [*good[:5], REFUSED, *good[6:32], *good[:32], *good[:7], REFUSED, *good[:9], REFUSED]
    contents += good[: 96 - len(contents)]
    _, expected = load("torchvision", contents)
    assert not pipelines
    bad, found = load("dali", contents)
    assert not bad
    assert torch.equal(found, expected)
    # One for the microbatches and one for single images, each again after a refusal.
    assert len(pipelines) <= 1 + 3 + 3


def test_what_neither_can_decode_is_replaced(pipelines: list[Pipeline]) -> None:
    chunks = chunks_of(FILES["PNG, colour"])
    broken = png_of([(kind, b"no zlib" if kind == b"IDAT" else content) for kind, content in chunks])
    contents = [FILES["JPEG, 4:2:0"], broken, REFUSED, FILES["PNG, colour"], broken]
    ours, theirs = (load(kind, contents) for kind in KINDS)
    assert ours[0] == theirs[0]
    assert ours[0].keys() == {1, 4}
    assert torch.equal(ours[1], theirs[1])
    assert 4 <= len(pipelines) <= 9


def test_an_error_may_belong_to_a_later_microbatch(
    pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with GPUs, whose stages run behind each other: told when the one before it is waited for."""
    contents = [*[FILES["JPEG, 4:2:0"]] * BATCH, REFUSED, FILES["PNG, colour"]]
    expected = load("torchvision", contents)[1]
    make, first = dali._pipeline, [True]

    class Early:
        def __init__(self, feed: Callable[[], object]) -> None:
            self._feed = feed

        def run(self, stream: object = None) -> None:
            self._feed()
            self._feed()
            raise RuntimeError("encountered:\nsomething is wrong with an image")

    def early(feed: Callable[[], object], *arguments: object, **options: object) -> object:
        if first.pop() if first else False:
            return Early(feed)
        return make(feed, *arguments, **options)

    monkeypatch.setattr(dali, "_pipeline", early)
    bad, found = load("dali", contents)
    assert not bad
    assert torch.equal(found, expected)


def test_an_error_that_no_image_explains_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    make, first = dali._pipeline, [True]

    class Failing:
        def __init__(self, feed: Callable[[], object]) -> None:
            self._feed = feed

        def run(self, stream: object = None) -> None:
            self._feed()
            raise RuntimeError("a traceback\nencountered:\n\nno room for this batch\nand more")

    def failing(feed: Callable[[], object], *arguments: object, **options: object) -> object:
        return Failing(feed) if first and first.pop() else make(feed, *arguments, **options)

    monkeypatch.setattr(dali, "_pipeline", failing)
    with pytest.raises(UserError, match="DALI failed on blob 0 and the 2 after it: no room for this batch$"):
        load("dali", [FILES["JPEG, 4:2:0"]] * 3)
