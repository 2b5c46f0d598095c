"""Finds every image of a split that cannot be decoded whole, before a run does.

A loader decodes no more than its window needs, and a run comes to an image once an epoch. Here every image is decoded
whole by what decodes it in a run, and one that fails ends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from hvd_lb.data.decoding.decode import BadImage, check_header, decode_image
from hvd_lb.data.decoding.plain import as_plain
from hvd_lb.data.decoding.stand_in import Content, RawBatch, StandIn, sizes
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Prepare, Preprocessing
from hvd_lb.data.loading.raw_batches import RawBatches
from hvd_lb.data.loading.threaded import ThreadedLoader
from hvd_lb.data.options import MAX_PIXELS, LoaderKind
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch, Windows

# What is decoded at a time, so that memory is bounded; an image of more pixels is alone.
_MOST_IMAGES, _MOST_PIXELS = 64, 16_000_000
_FILLER = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)
_TINY = Preprocessing(1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), antialias=False)


@dataclass(frozen=True)
class Failure:
    """An image that cannot be decoded, or not even be read."""

    image: int
    path: str
    reason: str


def verify(
    images: Images,
    loader: LoaderKind,
    *,
    threads: int,
    max_pixels: int = MAX_PIXELS,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Failure]:
    """Those that fail, by their number; `on_progress` is told how many images are done."""
    decoded = _by_dali if loader == "dali" else _by_pil
    done = 0
    for ids, failures in decoded(images, threads, max_pixels):
        yield from failures
        done += len(ids)
        on_progress(done)


Part = tuple[np.ndarray, list[Failure]]


def _parts(images: Images) -> Iterator[np.ndarray]:
    """All ids, in parts of bounded size."""
    start, pixels = 0, 0
    for stop in range(len(images)):
        own = int(images.widths[stop]) * int(images.heights[stop])
        if stop > start and (stop - start >= _MOST_IMAGES or pixels + own > _MOST_PIXELS):
            yield np.arange(start, stop)
            start, pixels = stop, 0
        pixels += own
    yield np.arange(start, len(images))


def _read(images: Images, prepare: Prepare, max_pixels: int, image_id: int) -> Content:
    """As a loader does, but what cannot be read, or was changed, is a bad image among others."""

    def read() -> np.ndarray:
        (content,) = images.read(np.array([image_id]))
        if not images.encoded:
            return content
        check_header(images, image_id, content, max_pixels)
        return prepare(images, image_id, content)

    return _or_bad(images, image_id, read)


def _or_bad(images: Images, image_id: int, make: Callable[[], np.ndarray]) -> Content:
    try:
        return make()
    except BadImage as bad:
        return bad
    except UserError as error:
        name = images.name(image_id)
        return BadImage(name, str(error).removeprefix(f"{name}: "))


def _read_ahead(images: Images, prepare: Prepare, threads: int, max_pixels: int) -> RawBatches:
    whole = (_whole(images, ids) for ids in _parts(images))

    def read(ids: np.ndarray) -> Iterator[Content]:
        return (_read(images, prepare, max_pixels, image_id) for image_id in ids.tolist())

    return RawBatches(read, whole, _MOST_IMAGES, start=threads)


def _by_pil(images: Images, threads: int, max_pixels: int) -> Iterator[Part]:
    def reason(image_id: int, content: Content) -> str | None:
        if images.encoded and not isinstance(content, BadImage):
            content = _or_bad(images, image_id, partial(decode_image, images, image_id, content))
        return content.reason if isinstance(content, BadImage) else None

    batches = _read_ahead(images, lambda _, image_id, content: content, threads, max_pixels)
    try:
        with ThreadPoolExecutor(threads, "hvd-lb verify") as pool:
            for batch in batches:
                ids = batch.microbatch.image_ids
                reasons = pool.map(reason, ids.tolist(), batch.data)
                found = zip(ids.tolist(), reasons, strict=True)
                yield ids, [Failure(i, images.name(i), why) for i, why in found if why is not None]
    finally:
        batches.close()


def _by_dali(images: Images, threads: int, max_pixels: int) -> Iterator[Part]:
    """By the loader itself: what fails is replaced by a filler, and told."""
    import torch

    from hvd_lb.data.loading.dali import dali_decoder

    batches = _read_ahead(images, as_plain, threads, max_pixels)
    told: list[StandIn] = []
    decode = dali_decoder(images, _TINY, _MOST_IMAGES, torch.device("cpu"), threads)
    with ThreadedLoader(batches, decode, _Fill(images), told.extend) as loader:
        for ids, _ in zip(_parts(images), loader, strict=True):
            failures = [Failure(of.image, of.path, of.reason) for of in told]
            told.clear()
            yield ids, failures


def _whole(images: Images, ids: np.ndarray) -> Microbatch:
    width, height = sizes(images, ids)
    zeros = np.zeros(len(ids), np.int32)
    return Microbatch(ids, Windows(zeros, zeros.copy(), width, height))


@dataclass(frozen=True)
class _Fill:
    """A `Repair` that puts one black pixel in the place of a bad image."""

    images: Images

    def __call__(self, batch: RawBatch, bad: dict[int, BadImage]) -> RawBatch:
        windows, data, found = batch.microbatch.windows, list(batch.data), list(batch.stand_ins)
        for position, why in bad.items():
            image = int(batch.microbatch.image_ids[position])
            windows.width[position] = windows.height[position] = 1
            data[position] = _FILLER
            found.append(StandIn(None, position, image, self.images.name(image), why.reason, image, ""))
        found.sort(key=lambda of: of.position)
        return RawBatch(batch.microbatch, data, tuple(found))
