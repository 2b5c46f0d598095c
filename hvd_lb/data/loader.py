"""Microbatches to tensors: what both loaders have in common, and the choice between them.

A loader knows nothing of epochs, ranks or processes: it executes a stream of microbatches (image ids, crop
windows, flips), which the plan made. Two threads work ahead of the consumer: one reads, one decodes.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
import torch

from hvd_lb.data.cached import CachedImages
from hvd_lb.data.decode import BadImage, check_header
from hvd_lb.data.images import Images
from hvd_lb.data.plain import as_plain
from hvd_lb.data.readahead import ReadAhead
from hvd_lb.data.stand_in import Content, Mend, RawBatch, StandIn, Substitute, Tell, refuse
from hvd_lb.plan.augment import Microbatch
from hvd_lb.recipe import MAX_PIXELS

Batch = tuple[torch.Tensor, torch.Tensor]

PREFETCH = 2


@dataclass(frozen=True)
class Pixels:
    """What a tensor looks like: `image_size` squared, normalised by mean and std of colours in [0, 1]."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool


class Decoded(NamedTuple):
    """The tensors of a microbatch, and which of its images are stand-ins."""

    x: torch.Tensor
    y: torch.Tensor
    stand_ins: tuple[StandIn, ...]


class Loader(Protocol):
    """Iterates (x float32 (b, 3, S, S) contiguous, y int64 (b,)) on the device, in the microbatches' order.

    Also a context manager. UserError for an image that cannot be read, or cannot be decoded and not be replaced.
    """

    @property
    def wait_seconds(self) -> float:
        """The time the consumer has spent waiting in `__next__` so far."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


Decode = Callable[[Images, Iterator[RawBatch], Mend], Iterator[Decoded]]
"""Turns what was read into tensors on the device, in order; one generator a loader."""

Prepare = Callable[[Images, int, np.ndarray], np.ndarray]
"""Makes of an image file's bytes what the decoder takes; BadImage where it is found out that they are broken."""


class ThreadedLoader:
    """The Loader around a decoding generator; see the module's docstring."""

    def __init__(
        self,
        images: Images,
        batches: Iterator[RawBatch],
        decode: Decode,
        mend: Mend,
        tell: Tell,
        prefetch: int = PREFETCH,
    ) -> None:
        self._tell = tell
        self._read = ReadAhead(batches, 2 * prefetch, "hvd-lb read")
        self._ready = ReadAhead(decode(images, self._read, mend), prefetch, "hvd-lb decode")
        self._close = weakref.finalize(self, _close, self._read, self._ready)  # also when it is just dropped
        # Before the interpreter ends, and before DALI's own exit function, registered earlier, pulls its pipelines
        # from under a running thread.
        atexit.register(self._close)

    @property
    def wait_seconds(self) -> float:
        return self._ready.wait_seconds

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        x, y, stand_ins = next(self._ready)
        if stand_ins:
            self._tell(stand_ins)
        if x.is_cuda:
            # Made on the decoding thread's stream, which has been waited for; from here on the consumer's.
            stream = torch.cuda.current_stream(x.device)
            x.record_stream(stream)
            y.record_stream(stream)
        return x, y

    def close(self) -> None:
        self._close()
        atexit.unregister(self._close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_loader(
    kind: Literal["dali", "torchvision"],
    images: Images,
    microbatches: Iterable[Microbatch],
    pixels: Pixels,
    *,
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int = PREFETCH,
    max_pixels: int = MAX_PIXELS,
    tell: Tell | None = None,
) -> Loader:
    """A loader of `kind` for microbatches of at most `batch_size` images, decoding with `threads` threads.

    `prefetch` microbatches are kept ready, and twice as many are read ahead of these.
    An image that cannot be decoded, or has more than `max_pixels` pixels, is an error. Where it is given `tell`,
    another image stands in: it is told of stand-ins right before the consumer gets the microbatch with them.
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
        from hvd_lb.data.dali import dali_decoder as decoder

        prepare = as_plain
    else:
        from hvd_lb.data.torch_loader import torchvision_decoder as decoder

        prepare = _as_it_is
    read = partial(_contents, images, prepare, max_pixels)
    mend: Mend = Substitute(images, read) if tell else refuse
    batches = _read(read, microbatches, batch_size, threads)
    decode = decoder(pixels, batch_size, device, threads)
    return ThreadedLoader(images, batches, decode, mend, tell or _nobody, prefetch)


def _nobody(stand_ins: Sequence[StandIn]) -> None:
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


def _close(*stages: ReadAhead) -> None:
    """In this order: a later stage may be waiting for an earlier one."""
    for stage in stages:
        stage.close()


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
