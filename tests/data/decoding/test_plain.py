"""One plan, two loaders: the same windows, labels and pixels, whatever the files are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import (
    GREY_LEVELS,
    SIZE,
    TURNS,
    as_pil_converts_it,
    deep_grey_files,
    files,
    turned_files,
)
from loader_cases import CPU, KINDS, BlobImages, as_levels, flips_of, load, one_window, random_batches
from PIL import Image

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.decoding.plain import plain_size
from hvd_lb.data.images import ArrayImages, Images
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch, RandomWindows
from hvd_lb.plan.samples import SamplePlan

FILES = files()
DECODED_BY_PIL = {
    "PNG, 16-bit grey and alpha",
    "PNG, 16-bit colour",
    "PNG, 16-bit colour, one transparent",
    "PNG, 16-bit colour and alpha",
    "PNG, more bytes after it",
    "PNG without its end",
    "JPEG, CMYK",
    "JPEG, progressive CMYK",
    "JPEG, YCCK",
    "JPEG, CMYK without Adobe's marker",
    "JPEG, more bytes after it",
    "JPEG, several pictures",
    "WebP, animated",
    *(kind for kind in FILES if kind.startswith(("AVIF", "BMP", "TIFF", "PPM", "PGM", "PBM"))),
}
SIDE = 13
CUTS = [(0, 0, False), (27, 17, True), (17, 11, False), (3, 16, True)]


def blobs(contents: list[bytes], size: tuple[int, int] = SIZE) -> BlobImages:
    return BlobImages([np.frombuffer(content, np.uint8) for content in contents], [size] * len(contents))


def cut(contents: list[bytes]) -> dict[str, torch.Tensor]:
    """By loader: the CUTS of every image, without resizing, (cuts, images, 3, SIDE, SIDE)."""
    ids = list(range(len(contents)))
    batches = [one_window(ids, x, y, SIDE, flip) for x, y, flip in CUTS]
    return {kind: torch.stack(load(kind, blobs(contents), batches, as_levels(SIDE))) for kind in KINDS}


def expected_cuts(picture: np.ndarray) -> torch.Tensor:
    """(cuts, 3, SIDE, SIDE)"""
    windows = [
        picture[y : y + SIDE, x : x + SIDE][:, :: -1 if flip else 1].transpose(2, 0, 1) for x, y, flip in CUTS
    ]
    return torch.from_numpy(np.stack(windows)).float()


@pytest.fixture(scope="module")
def cuts_of_files() -> dict[str, torch.Tensor]:
    return cut(list(FILES.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_pixels_are_exactly_those_of_pil(
    file: str, kind: str, cuts_of_files: dict[str, torch.Tensor]
) -> None:
    found = cuts_of_files[kind][:, list(FILES).index(file)]
    assert torch.equal(found, expected_cuts(as_pil_converts_it(FILES[file])))


def test_of_16_bit_grey_the_high_byte_counts() -> None:
    expected = expected_cuts(np.repeat((GREY_LEVELS >> 8)[..., None], 3, axis=2))
    for found in cut(list(deep_grey_files().values())).values():
        assert all(torch.equal(found[:, index], expected) for index in range(found.shape[1]))


@pytest.mark.parametrize("turn", TURNS)
def test_exif_orientation_is_ignored(turn: int) -> None:
    turned, plain = zip(*turned_files(turn).values(), strict=True)
    with_turn, without = cut(list(turned)), cut(list(plain))
    for kind in KINDS:
        assert torch.equal(with_turn[kind], without[kind])
    assert torch.equal(with_turn["dali"], with_turn["torchvision"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_warns_of_alpha_that_is_dropped(kind: str) -> None:
    content = FILES["PNG, palette, each with alpha"]
    load(kind, blobs([content]), [one_window([0], 0, 0, 8, False)], as_levels(8))


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 50), (50, 1)])
def test_sides_of_one_pixel(size: tuple[int, int], codec: str, make_photo, encode) -> None:
    picture = encode(make_photo(50, 50).crop((0, 0, *size)), codec)
    images = BlobImages([picture], [size])
    expected = as_pil_converts_it(picture.tobytes())
    for x, y in {(0, 0), (size[0] // 2, size[1] // 2), (size[0] - 1, size[1] - 1)}:
        for kind in KINDS:
            (pixel,) = load(kind, images, [one_window([0], x, y, 1, False)], as_levels(1))
            assert pixel.flatten().tolist() == expected[y, x].tolist()
    ours, theirs = (
        torch.stack(load(kind, images, random_batches(images, 4), as_levels(8, antialias=False)))
        for kind in KINDS
    )
    assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.1307,) * 3, (0.3081,) * 3),
        ((0.0,) * 3, (1 / 255,) * 3),
    ],
)
def test_no_bit_differs_after_normalising(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    images = ArrayImages(levels, np.zeros(1), ["any"], "array")
    ours, theirs = (
        load(kind, images, [one_window([0], 0, 0, 16, False)], Preprocessing(16, mean, std, True))[0]
        for kind in KINDS
    )
    assert torch.equal(ours, theirs)


def plan_of(images: Images, windows: RandomWindows) -> list[Microbatch]:
    """Two epochs, their short last steps included."""
    plan = SamplePlan(len(images), workers=3, per_worker=4, seed=windows.seed, last_batch="keep")
    return [
        Microbatch(ids, windows.windows(epoch, ids, images.widths[ids], images.heights[ids]))
        for epoch in range(2)
        for step in range(plan.steps_per_epoch)
        for worker in range(plan.workers)
        for ids in [plan.image_ids(epoch, step, worker)]
        if len(ids)
    ]


def execute(
    kind: str, images: Images, batches: list[Microbatch], pixels: Preprocessing
) -> list[torch.Tensor]:
    """The tensors; the labels are checked."""
    with open_loader(kind, images, batches, pixels, batch_size=4, device=CPU, threads=2) as loader:
        loaded = [(x.clone(), y) for x, y in loader]
    assert [y.tolist() for _, y in loaded] == [images.labels[batch.image_ids].tolist() for batch in batches]
    assert all(x.is_contiguous() for x, _ in loaded)
    return [x for x, _ in loaded]


def write_splits(folder: Path, contents: dict[str, bytes]) -> Images:
    """The training split of a folder data set of three classes, `contents` by file name."""
    for number, (name, content) in enumerate(contents.items()):
        for split in ("train", "val"):
            path = folder / split / "abc"[number % 3] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return open_dataset(str(folder)).train


def test_a_plan_over_every_kind_of_file_without_resizing(tmp_path: Path) -> None:
    names = {f"{number}.{kind.replace(',', '').split()[0]}": kind for number, kind in enumerate(FILES)}
    images = write_splits(tmp_path, {name: FILES[kind] for name, kind in names.items()})
    largest_square = RandomWindows(seed=5, scale=(1, 1), ratio=(1, 1))
    batches = plan_of(images, largest_square)
    side = min(SIZE)
    ours, theirs = (torch.cat(execute(kind, images, batches, as_levels(side))) for kind in KINDS)
    assert torch.equal(ours, theirs)
    expected = []
    for batch in batches:
        for image_id, flip in zip(batch.image_ids, flips_of(batch.windows), strict=True):
            picture = as_pil_converts_it(FILES[names[Path(images.name(image_id)).name]])
            square = picture[:, (SIZE[0] - side) // 2 :][:, :side]
            expected.append((square[:, ::-1] if flip else square).transpose(2, 0, 1))
    assert torch.equal(ours, torch.from_numpy(np.stack(expected)).float())


@pytest.mark.parametrize("antialias", [False, True])
def test_a_plan_over_photographs_with_resizing(antialias: bool, tmp_path: Path, make_photo, encode) -> None:
    codecs = ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]
    images = write_splits(
        tmp_path,
        {
            f"{number}.{codec}": encode(make_photo(90 + 7 * number, 160 - 5 * number), codec).tobytes()
            for number, codec in enumerate(codecs * 4)
        },
    )
    batches = plan_of(images, RandomWindows(seed=5))
    ours, theirs = (torch.cat(execute(kind, images, batches, as_levels(48, antialias))) for kind in KINDS)
    difference = (ours - theirs).abs()
    assert difference[..., 1:-1, 1:-1].max() <= 1
    assert difference.max() <= (16 if antialias else 1)
    assert difference.mean() < 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_the_windows_can_be_read_off_the_pixels(kind: str) -> None:
    """Red is 4x and green is 4y, so lines through the pixels show where a window began and how large it was."""
    width, height, side = 60, 45, 40
    ramps = np.zeros((1, height, width, 3), np.uint8)
    ramps[..., 0], ramps[..., 1] = 4 * np.arange(width), 4 * np.arange(height)[:, None]
    images = ArrayImages(ramps.repeat(30, axis=0), np.zeros(30), ["any"], "ramps")
    (batch,) = random_batches(images, 1)
    (x,) = load(kind, images, [batch], as_levels(side))
    windows = batch.windows
    inner = slice(4, -4)
    centres = (np.arange(side)[inner] + 0.5) / side
    for index, tensor in enumerate(x.numpy() / 4):
        red, green = tensor[0, inner, inner].mean(axis=0), tensor[1, inner, inner].mean(axis=1)
        across, left = np.polyfit(centres, red[::-1] if flips_of(windows)[index] else red, 1)
        down, top = np.polyfit(centres, green, 1)
        found = np.array([left + 0.5, top + 0.5, across, down])
        planned = [of[index] for of in (windows.x, windows.y, windows.width, windows.height)]
        np.testing.assert_allclose(found, planned, atol=0.4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", ["JPEG", "PNG", "TIFF", "BMP", "PPM"])
def test_a_file_cut_short_is_an_error_also_when_its_window_is_whole(kind, codec, make_photo, encode) -> None:
    content = encode(make_photo(300, 300), codec).tobytes()
    with pytest.raises(UserError, match="blob 0: cannot be decoded .*truncated.*; repair or remove it"):
        load(
            kind,
            blobs([content[: len(content) * 9 // 10]], (300, 300)),
            [one_window([0], 0, 0, 8, False)],
            as_levels(8),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP", "AVIF", "BMP"])
def test_an_image_that_has_grown_is_an_error(kind: str, codec: str, make_photo, encode) -> None:
    content = encode(make_photo(60, 50), codec).tobytes()
    with pytest.raises(UserError, match="blob 0: is 60 x 50 pixels now, but was 20 x 20"):
        load(kind, blobs([content], (20, 20)), [one_window([0], 0, 0, 8, False)], as_levels(8))


@pytest.mark.parametrize("file", FILES)
def test_what_dali_decodes_has_the_size_of_its_header(file: str) -> None:
    found = plain_size(np.frombuffer(FILES[file], np.uint8))
    assert found == (None if file in DECODED_BY_PIL else SIZE)


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 300), (257, 4096)])
@pytest.mark.parametrize(
    ("mode", "codec", "options"),
    [
        ("RGB", "JPEG", {}),
        ("L", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {}),
    ],
)
def test_sizes_of_more_than_a_byte(size, mode, codec, options, encode) -> None:
    assert plain_size(encode(Image.new(mode, size), codec, **options)) == size


@given(st.sampled_from(sorted(set(FILES) - DECODED_BY_PIL)), st.data())
def test_no_part_of_a_file_is_plain(file: str, data: st.DataObject) -> None:
    content = FILES[file]
    part = content[: data.draw(st.integers(0, len(content) - 1))]
    assert plain_size(np.frombuffer(part, np.uint8)) is None


@given(st.sampled_from([b"\xff\xd8", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF"]), st.binary(max_size=200))
def test_bytes_of_no_image_are_not_plain(magic: bytes, rest: bytes) -> None:
    assert plain_size(np.frombuffer(magic + rest, np.uint8)) is None
