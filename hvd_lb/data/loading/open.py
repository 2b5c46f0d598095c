"""From microbatches to a loader: which decoder, what is prepared for it, and how images are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from hvd_lb.data.decoding.decode import BadImage, check_header
from hvd_lb.data.decoding.plain import as_plain
from hvd_lb.data.decoding.stand_in import Content, OnStandIns, Repair, StandIn, Substitute, refuse
from hvd_lb.data.files.threads import MOST_THREADS
from hvd_lb.data.images import Images
from hvd_lb.data.index.images import IndexedImages
from hvd_lb.data.loading.contract import PREFETCH, Batch, Loader, Prepare, Preprocessing
from hvd_lb.data.loading.raw_batches import RawBatches
from hvd_lb.data.loading.shared_pixels import CachedImages
from hvd_lb.data.loading.threaded import ThreadedLoader
from hvd_lb.data.options import MAX_PIXELS, LoaderKind
from hvd_lb.plan.augment import Microbatch


class Loaders:
    """Opens loaders of `kind` for microbatches of at most `batch_size` images, decoding with `threads` threads.

    What takes long to make is kept for the next loader: a DALI pipeline whose loader came to its end.
    On GPUs, tensors come in `memory_format`; on CPUs they are contiguous.
    `prefetch` microbatches are kept ready. Images are read ahead of these (`hvd_lb.data.loading.raw_batches`) by
    `read_threads` threads, or by as many as help.
    An image that cannot be decoded, or has more than `max_pixels` pixels, is an error. With `on_stand_ins`
    another image stands in: it is called with the stand-ins right before the consumer gets their microbatch.
    """

    def __init__(
        self,
        kind: LoaderKind,
        images: Images,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        read_threads: int | None = None,
        prefetch: int = PREFETCH,
        max_pixels: int = MAX_PIXELS,
        on_stand_ins: OnStandIns | None = None,
    ) -> None:
        if min(threads, threads if read_threads is None else read_threads, batch_size, prefetch) < 1:
            raise ValueError(
                f"threads={threads}, read_threads={read_threads}, batch_size={batch_size}, prefetch={prefetch}: "
                "expected positive numbers"
            )
        if device == torch.device("cuda"):
            device = torch.device(
                "cuda", torch.cuda.current_device()
            )  # this thread's, not the decoding one's
        prepare: Prepare
        # Imported when chosen: DALI exists for fewer platforms than torchvision.
        if kind == "dali" and (images.encoded or device.type == "cuda"):  # else there is nothing for it to do
            from hvd_lb.data.loading.dali import dali_decoder as decoder

            prepare = as_plain
        else:
            from hvd_lb.data.loading.torchvision import torchvision_decoder as decoder

            prepare = _as_it_is
        self.images, self.batch_size = images, batch_size
        self._threads, self._read_threads, self._prefetch = threads, read_threads, prefetch
        self._read = read = partial(_contents, images, prepare, max_pixels)
        self._decode = decoder(images, preprocessing, batch_size, device, threads, memory_format)
        self._repair: Repair = Substitute(images, lambda ids: list(read(ids))) if on_stand_ins else refuse
        self._on_stand_ins = on_stand_ins or _ignore

    def open(self, microbatches: Iterable[Microbatch], more: int = 0) -> Loader:
        """A loader for these, which keeps `more` of them ready than others do."""
        most = self.images.most_threads if isinstance(self.images, IndexedImages) else MOST_THREADS
        batches = RawBatches(
            self._read,
            microbatches,
            self.batch_size,
            threads=self._read_threads,
            start=self._threads,
            most=most,
        )
        return ThreadedLoader(batches, self._decode, self._repair, self._on_stand_ins, self._prefetch + more)


class InTurn:
    """The loaders that these open as one: the first at once, each other when the one before has come to its end."""

    def __init__(self, openings: Iterable[Callable[[], Loader]]) -> None:
        self._openings, self._waited = iter(openings), 0.0
        first = next(self._openings, None)
        self._present = first() if first else None

    @property
    def wait_seconds(self) -> float:
        return self._waited + (self._present.wait_seconds if self._present else 0.0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while True:
            if self._present is None:
                self._present = next(self._openings)()
            with suppress(StopIteration):
                return next(self._present)
            self.close()

    def close(self) -> None:
        if self._present:
            self._waited = self.wait_seconds
            self._present.close()
            self._present = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_loader(
    kind: LoaderKind,
    images: Images,
    microbatches: Iterable[Microbatch],
    preprocessing: Preprocessing,
    **options: Any,
) -> Loader:
    """A single loader of `Loaders(kind, images, preprocessing, **options)`."""
    return Loaders(kind, images, preprocessing, **options).open(microbatches)


def _ignore(stand_ins: Sequence[StandIn]) -> None:
    pass


def _as_it_is(images: Images, image_id: int, content: np.ndarray) -> np.ndarray:
    return content


def _contents(images: Images, prepare: Prepare, max_pixels: int, ids: np.ndarray) -> Iterable[Content]:
    if isinstance(images, CachedImages):
        return (_decoded(images, max_pixels, image_id) for image_id in ids.tolist())
    if not images.encoded:
        return images.read(ids)
    return (_content(images, prepare, max_pixels, image_id) for image_id in ids.tolist())


def _content(images: Images, prepare: Prepare, max_pixels: int, image_id: int) -> Content:
    (content,) = images.read(np.array([image_id]))
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
