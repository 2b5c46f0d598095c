"""From microbatches to a loader: which decoder, what is prepared for it, and how images are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from hvd_lb.data.decoding.decode import BadImage, check_header
from hvd_lb.data.decoding.plain import as_plain
from hvd_lb.data.decoding.stand_in import Content, OnStandIns, RawBatch, Repair, StandIn, Substitute, refuse
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import PREFETCH, Loader, Prepare, Preprocessing
from hvd_lb.data.loading.shared_pixels import CachedImages
from hvd_lb.data.loading.threaded import ThreadedLoader
from hvd_lb.data.options import MAX_PIXELS, LoaderKind
from hvd_lb.plan.augment import Microbatch


def open_loader(
    kind: LoaderKind,
    images: Images,
    microbatches: Iterable[Microbatch],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int = PREFETCH,
    max_pixels: int = MAX_PIXELS,
    on_stand_ins: OnStandIns | None = None,
) -> Loader:
    """A loader of `kind` for microbatches of at most `batch_size` images, decoding with `threads` threads.

    `prefetch` microbatches are kept ready, and twice as many are read ahead of these.
    An image that cannot be decoded, or has more than `max_pixels` pixels, is an error. With `on_stand_ins`
    another image stands in: it is called with the stand-ins right before the consumer gets their microbatch.
    """
    if min(threads, batch_size, prefetch) < 1:
        raise ValueError(
            f"threads={threads}, batch_size={batch_size}, prefetch={prefetch}: expected positive numbers"
        )
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())  # this thread's, not the decoding one's
    prepare: Prepare
    # Imported when chosen: DALI exists for fewer platforms than torchvision.
    if kind == "dali" and (images.encoded or device.type == "cuda"):  # else there is nothing for it to do
        from hvd_lb.data.loading.dali import dali_decoder as decoder

        prepare = as_plain
    else:
        from hvd_lb.data.loading.torchvision import torchvision_decoder as decoder

        prepare = _as_it_is
    read = partial(_contents, images, prepare, max_pixels)
    repair: Repair = Substitute(images, read) if on_stand_ins else refuse
    batches = _read(read, microbatches, batch_size, threads)
    decode = decoder(preprocessing, batch_size, device, threads)
    return ThreadedLoader(images, batches, decode, repair, on_stand_ins or _ignore, prefetch)


def _ignore(stand_ins: Sequence[StandIn]) -> None:
    pass


def _as_it_is(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
    return content


def _contents(images: Images, prepare: Prepare, max_pixels: int, ids: np.ndarray) -> list[Content]:
    if isinstance(images, CachedImages):
        return [_decoded(images, max_pixels, image_id) for image_id in ids.tolist()]
    return [
        _content(images, prepare, max_pixels, image_id, content)
        for image_id, content in zip(ids.tolist(), images.read(ids), strict=True)
    ]


def _content(
    images: Images, prepare: Prepare, max_pixels: int, image_id: int, content: np.ndarray
) -> Content:
    if not images.encoded:
        return content
    try:
        check_header(images, image_id, content, max_pixels)
        return prepare(images, image_id, content)
    except BadImage as bad:
        return bad


def _decoded(images: CachedImages, max_pixels: int, image_id: int) -> Content:
    try:
        return images.decoded(image_id, max_pixels)
    except BadImage as bad:
        return bad


def _read(
    read: Callable[[np.ndarray], list[Content]],
    microbatches: Iterable[Microbatch],
    batch_size: int,
    threads: int,
) -> Iterator[RawBatch]:
    """Reads the images of a microbatch in `threads` parts at once: files may be far away."""
    with ThreadPoolExecutor(threads, "hvd-lb read") as pool:
        for microbatch in microbatches:
            ids = microbatch.image_ids
            if not 1 <= len(ids) <= batch_size:
                raise ValueError(f"a microbatch of {len(ids)} images; expected 1 to {batch_size}")
            parts = pool.map(read, np.array_split(ids, min(threads, len(ids))))
            yield RawBatch(microbatch, [data for part in parts for data in part])
