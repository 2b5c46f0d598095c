"""Images that cannot be decoded: named when they end the run, and replaced by a function of the plan when not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import good_file, with_size
from image_files import with_chunk
from loader_cases import CPU, KINDS, BlobImages, as_levels

from hvd_lb.data.decoding.decode import BadImage, check_header
from hvd_lb.data.decoding.stand_in import MOST_TRIES, RawBatch, StandIn, Substitute, sizes
from hvd_lb.data.images import Images
from hvd_lb.data.loading.open import open_loader
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch, Origin, RandomWindows

SIZE = 24
WINDOWS = RandomWindows(seed=3)


def draw(ids: np.ndarray, widths: np.ndarray, heights: np.ndarray):
    return WINDOWS.windows(5, ids, widths, heights)


def make_images(broken: dict[int, bytes], count: int = 12) -> BlobImages:
    blobs, shapes = [], []
    for number in range(count):
        kind = "JPEG" if number % 2 else "PNG"
        blobs.append(np.frombuffer(broken.get(number, good_file(kind, number)), np.uint8))
        shapes.append((40 + number % 7, 40 - number % 5))
    return BlobImages(blobs, shapes)


def batch(images: Images, ids: Sequence[int], step: int = 0) -> Microbatch:
    chosen = np.array(ids, np.int64)
    return Microbatch(chosen, draw(chosen, *sizes(images, chosen)), Origin("train", 5, step, 1), draw)


def skip(
    kind: str, images: Images, batches: list[Microbatch], **options: object
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[StandIn]]:
    told: list[StandIn] = []
    size = max(map(len, batches))
    arguments = {"batch_size": size, "device": CPU, "threads": 2, "on_stand_ins": told.extend, **options}
    with open_loader(kind, images, batches, as_levels(SIZE), **arguments) as loader:
        return [(x.clone(), y) for x, y in loader], told


def broken_files(number: int) -> dict[str, bytes]:
    """As many ways to break image `number`; "damaged" ones begin and end as they should."""
    png, jpeg = good_file("PNG", number), good_file("JPEG", number)
    return {
        "cut short JPEG": jpeg[: len(jpeg) // 2],
        "cut short PNG": png[: len(png) // 2],
        "damaged PNG": png[:200] + bytes(300) + png[500:],
        "empty": b"",
        "text": b"not found" * 20,
    }


BROKEN = broken_files(4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", BROKEN)
def test_the_next_image_that_decodes_stands_in(kind: str, how: str) -> None:
    images = make_images({4: BROKEN[how]})
    batches = [batch(images, ids, step) for step, ids in enumerate([(0, 1), (2, 4, 3), (7, 8), (4,), (9,)])]
    expected = [batch(images, ids, step) for step, ids in enumerate([(0, 1), (2, 5, 3), (7, 8), (5,), (9,)])]
    found, told = skip(kind, images, batches)
    for (x, y), (expected_x, expected_y) in zip(found, skip(kind, images, expected)[0], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    assert [(of.origin, of.position, of.image, of.stand_in) for of in told] == [
        (Origin("train", 5, 1, 1), 1, 4, 5),
        (Origin("train", 5, 3, 1), 0, 4, 5),
    ]
    assert (told[0].path, told[0].stand_in_path) == ("blob 4", "blob 5")
    assert told[0].reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_may_be_broken_too_and_ids_go_round(kind: str) -> None:
    images = make_images({10: b"", 11: broken_files(11)["damaged PNG"], 0: broken_files(0)["cut short PNG"]})
    found, told = skip(kind, images, [batch(images, (11, 3, 10))])
    assert found[0][1].tolist() == [1, 3, 1]
    assert [(of.position, of.image, of.stand_in) for of in told] == [(0, 11, 1), (2, 10, 1)]


def test_stand_ins_are_told_by_position_whichever_was_found_first() -> None:
    """A decoder may refuse one of a batch in which others were replaced before."""
    images = make_images({})
    repair = Substitute(images, lambda ids: list(images.read(ids)))
    ids = np.arange(5)
    repaired = RawBatch(batch(images, range(5)), list(images.read(ids)))
    for position in (3, 1, 4):
        repaired = repair(repaired, {position: BadImage("x", "broken")})
    assert [of.position for of in repaired.stand_ins] == [1, 3, 4]
    assert repaired.microbatch.image_ids.tolist() == [0, 2, 2, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_broken_in_a_row_end_the_run(kind: str) -> None:
    few = make_images(dict.fromkeys(range(5), b""), count=5)
    with pytest.raises(UserError, match="none of the 4 images after it can be decoded either"):
        skip(kind, few, [batch(few, (2,))])
    many = make_images(dict.fromkeys(range(MOST_TRIES + 1), b""), count=MOST_TRIES + 2)
    assert skip(kind, many, [batch(many, (1,))])[1][0].stand_in == MOST_TRIES + 1
    with pytest.raises(UserError, match=f"none of the {MOST_TRIES} images"):
        skip(kind, many, [batch(many, (0,))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", BROKEN)
def test_without_skip_path_reason_and_step_are_told(kind: str, how: str) -> None:
    images = make_images({4: BROKEN[how]})
    with (
        open_loader(
            kind,
            images,
            [batch(images, (1, 4), 17)],
            as_levels(SIZE),
            batch_size=2,
            device=CPU,
            threads=1,
        ) as loader,
        pytest.raises(
            UserError,
            match=r"^blob 4: cannot be decoded \(.+\), in epoch 5 step 17; .* --on-bad-image skip$",
        ),
    ):
        next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_bounded_by_the_header_before_anything_is_decoded(kind: str) -> None:
    images = make_images(
        {4: with_size(good_file("JPEG", 4), 9000, 9000), 6: with_size(good_file("PNG", 6), 30_000, 30_000)}
    )
    images.widths[4] = images.heights[4] = 9000
    images.widths[6] = images.heights[6] = 0
    _, told = skip(kind, images, [batch(images, (4, 6, 1))], max_pixels=10_000_000)
    assert [of.image for of in told] == [4, 6]
    assert told[0].reason == "9000 x 9000 pixels are more than the 10000000 of --max-pixels"
    assert "pixels" in told[1].reason


def test_as_many_pixels_as_are_allowed_are_not_too_many() -> None:
    images = make_images({})
    (content,) = images.read(np.array([4]))
    check_header(images, 4, content, 44 * 36)
    with pytest.raises(BadImage, match="44 x 36 pixels are more than the 1583"):
        check_header(images, 4, content, 44 * 36 - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_a_size_that_has_one_now_was_changed(kind: str) -> None:
    images = make_images({})
    images.widths[4] = images.heights[4] = 0
    with pytest.raises(UserError, match="blob 4: is 44 x 36 pixels now, but was 0 x 0 .* leave files in use"):
        skip(kind, images, [batch(images, (4,))])


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_file_system_does_not_give_is_never_skipped(kind: str) -> None:
    class Failing(BlobImages):
        def read(self, ids: np.ndarray) -> list[np.ndarray]:
            if 4 in ids:
                raise UserError("blob 4: cannot be read (Input/output error, 5 times)")
            return super().read(ids)

    whole = make_images({})
    images = Failing(whole.blobs, list(zip(whole.widths, whole.heights, strict=True)))
    with pytest.raises(UserError, match="Input/output error"):
        skip(kind, images, [batch(images, (4, 1))])


@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_is_no_bad_image(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    images = make_images({4: BROKEN["cut short PNG"]})
    monkeypatch.setattr("hvd_lb.data.decoding.decode._as_stored", fails)
    with pytest.raises(UserError, match="not enough memory"):
        skip(kind, images, [batch(images, (4,))])


@pytest.mark.parametrize("kind", KINDS)
def test_a_png_with_a_wrong_checksum_is_bad_for_both_loaders(kind: str) -> None:
    """PIL does not look at those of image data, DALI at those of text."""
    content = with_chunk(good_file("PNG", 4), b"tEXt", b"text")
    for chunk in (b"IHDR", b"tEXt", b"IDAT", b"IEND"):
        at = content.index(chunk)
        length = int.from_bytes(content[at - 4 : at], "big")
        wrong = bytearray(content)
        wrong[at + 4 + length] ^= 1
        images = make_images({4: bytes(wrong)})
        if chunk == b"IHDR":
            images.widths[4] = images.heights[4] = 0
        (told,) = skip(kind, images, [batch(images, (4, 1))])[1]
        assert (told.image, told.stand_in) == (4, 5)
        assert (
            "PNG header is damaged" in told.reason
            if chunk == b"IHDR"
            else repr(chunk.decode()) in told.reason
        )


CRASH = """if True:
    import sys
    from broken import good_file
    from test_stand_in import batch, make_images, skip
    names = {number: good_file("JPEG", number) for number in range(32)}
    jpeg = names[4]
    start = jpeg.index(b"\\xff\\xc4") + 2
    names[4] = jpeg[:start] + bytes([jpeg[start], jpeg[start + 1] + 3]) + jpeg[start + 2:]
    images = make_images(names, count=32)
    for _ in range(20):
        skip("dali", images, [batch(images, range(32))])
"""


@pytest.mark.slow
def test_a_header_that_dali_cannot_follow_does_not_crash_the_process() -> None:
    """In a process of its own: given such a JPEG in a batch of 32, DALI 2.4.0 died of SIGSEGV."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    ended = subprocess.run(
        [sys.executable, "-c", CRASH], check=False, capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
