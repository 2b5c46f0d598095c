"""The DALI loader: a pipeline that decodes and cuts what the plan says and, on GPUs, resizes and normalises.

On CPUs `hvd_lb.data.loading.resize` does the rest, many times as fast. On CUDA the JPEGs are decoded there ("mixed").
One iteration of the pipeline is one microbatch: on GPUs the share decoded by hardware depends on the batch,
so the pixels of a microbatch would else depend on its neighbours. None of DALI's own randomness, shuffling or
sharding is used.

One image that DALI refuses costs it the batches under way and the pipeline. DALI does not always tell which one it was,
so the images of the batch are decoded one by one, with their windows, in a pipeline that is kept for that. What it
refuses is what PIL makes of it, pixels or a bad image; then a new pipeline starts over with the batch.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from hvd_lb.data.decoding.decode import BadImage
from hvd_lb.data.decoding.plain import as_pixels
from hvd_lb.data.decoding.stand_in import Content, RawBatch, Repair
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Decode, Decoded, Preprocessing
from hvd_lb.data.loading.device import loading_stream
from hvd_lb.data.loading.nvjpeg import load_nvjpeg
from hvd_lb.data.loading.resize import Finisher
from hvd_lb.errors import HostError

_PREFETCH = 2

# The share of a batch's JPEGs that goes to a GPU's own decoder. DALI's default, fixed here: pixels depend on it.
_HARDWARE_SHARE = 0.65


def dali_decoder(
    images: Images,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    threads: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Decode:
    """Decodes `images` on `device` with `threads` CPU threads; for GPUs it takes decoded images, too.

    A pipeline that came to the end of its microbatches is kept for the next ones: on GPUs making one takes long.
    """
    kept: deque[_Reusable] = deque(maxlen=1)  # who opens several loaders at a time keeps each open for long

    def pipeline() -> _Reusable:
        with suppress(IndexError):
            return kept.pop()
        return _Reusable(images.encoded, preprocessing, batch_size, device, threads)

    def decode(batches: Iterator[RawBatch], repair: Repair) -> Iterator[Decoded]:
        single = _Single(images, preprocessing, device)
        feed = _Feed(batches, repair)
        if device.type == "cuda":
            stream = loading_stream(device)
            outputs = _outputs(images, feed, pipeline, kept.append, single, stream)
            return _on_gpu(images, outputs, stream, memory_format)
        outputs = _outputs(images, feed, pipeline, kept.append, single, None)
        return _on_cpu(images, outputs, preprocessing, batch_size, threads)

    return decode


Outputs = Iterator[tuple[RawBatch, Any]]
"""Microbatches and DALI's output for them: the windows on CPUs, the tensor on GPUs. Valid until the next one."""


def _on_cpu(
    images: Images, outputs: Outputs, preprocessing: Preprocessing, batch_size: int, threads: int
) -> Iterator[Decoded]:
    # DALI meanwhile decodes the next microbatches.
    with ThreadPoolExecutor(threads, "hvd-lb resize") as pool:
        finish = Finisher(preprocessing, batch_size, pool)
        for batch, output in outputs:
            x = finish([np.asarray(crop) for crop in output], batch.microbatch.windows)
            yield Decoded(x, torch.from_numpy(images.labels[batch.microbatch.image_ids]), batch.stand_ins)


def _on_gpu(
    images: Images, outputs: Outputs, stream: torch.cuda.Stream, memory_format: torch.memory_format
) -> Iterator[Decoded]:
    for batch, output in outputs:
        with torch.cuda.stream(stream):
            x = batch.microbatch.windows.augmented_batch(_own(output, memory_format))
            y = torch.from_numpy(images.labels[batch.microbatch.image_ids]).to(stream.device)
        stream.synchronize()
        yield Decoded(x, y, batch.stand_ins)


def _own(output: Any, memory_format: torch.memory_format) -> torch.Tensor:
    """A copy of what `_finished` makes, (b, 3, S, S) in this format.

    Python may let go of DALI's memory before the consumer's kernels have run; only torch's own allocator can wait for
    those (record_stream in ThreadedLoader).
    """
    return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2).clone(memory_format=memory_format)


def _outputs(
    images: Images,
    feed: _Feed,
    take: Callable[[], _Reusable],
    keep: Callable[[_Reusable], None],
    single: _Single,
    stream: torch.cuda.Stream | None,
) -> Outputs:
    pipeline = take().begin(feed)
    while True:
        try:
            output = pipeline.run(stream)
        except StopIteration:
            break
        except RuntimeError as error:
            if not feed.in_flight:  # the pipeline itself could not be made
                raise
            # On GPUs it may be a later batch than the one that was waited for.
            for position, batch in enumerate(feed.in_flight):
                if (without := single.without_refused(batch)) is not batch:
                    bad = without.bad()
                    feed.in_flight[position] = feed.repair(without, bad) if bad else without
                    break
            else:
                first = feed.in_flight[0].microbatch
                name = images.name(int(first.image_ids[0]))
                raise HostError(
                    f"DALI failed on {name} and the {len(first) - 1} after it: {_cause(error)}"
                ) from error
            feed.rewind()
            pipeline = take().begin(feed)
            continue
        yield feed.in_flight.popleft(), output
    if feed.failure is not None:
        raise feed.failure
    pipeline.end()
    keep(pipeline)


Inputs = tuple[list[np.ndarray], np.ndarray, np.ndarray]
"""Image files (or pixels), where their windows begin (b, 2) and how large these are (b, 2): x, y; width, height."""


class _Feed:
    """Gives the pipeline its inputs; what the reading raises waits until the batches before it are out."""

    def __init__(self, batches: Iterator[RawBatch], repair: Repair) -> None:
        self._batches, self.repair = batches, repair
        self._again: deque[RawBatch] = deque()
        self.in_flight: deque[RawBatch] = deque()
        self.failure: Exception | None = None

    def rewind(self) -> None:
        """What is in flight is given to the next pipeline again."""
        self._again.extendleft(reversed(self.in_flight))
        self.in_flight.clear()

    def __call__(self) -> Inputs:
        batch = self._again.popleft() if self._again else self._next()
        self.in_flight.append(batch)
        return _inputs(batch)

    def _next(self) -> RawBatch:
        if self.failure is not None:
            raise StopIteration
        try:
            batch = next(self._batches)
            bad = batch.bad()
            return self.repair(batch, bad) if bad else batch
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise StopIteration from error


def _inputs(batch: RawBatch) -> Inputs:
    windows = batch.microbatch.windows
    anchor = np.stack([windows.x, windows.y], axis=1)
    shape = np.stack([windows.width, windows.height], axis=1)
    return [content for content in batch.data if not isinstance(content, BadImage)], anchor, shape


class _Reusable:
    """A pipeline for one feed after another."""

    def __init__(self, *of: Any) -> None:
        self._source = _Source()
        self._pipeline = _pipeline(self._source, *of)

    def begin(self, feed: Callable[[], Inputs]) -> Self:
        self._source.feed = feed
        return self

    def run(self, stream: torch.cuda.Stream | None) -> Any:
        """The output for the next inputs; StopIteration after the last."""
        return self._pipeline.run(stream)[0]

    def end(self) -> None:
        """After StopIteration: there may be another feed."""
        self._pipeline.reset()
        self._source.feed = _nothing


class _Source:
    """What a pipeline calls; it does not know the pipeline, so that both go with the last reference to the pipeline."""

    feed: Callable[[], Inputs]

    def __call__(self) -> Inputs:
        return self.feed()


def _nothing() -> Inputs:
    raise StopIteration


def _pipeline(
    feed: Callable[[], Inputs],
    encoded: bool,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    threads: int,
    ahead: int = _PREFETCH,
) -> Pipeline:
    on_gpu = device.type == "cuda"
    if on_gpu:
        load_nvjpeg()
    pipeline = Pipeline(
        batch_size,
        threads,
        device.index if on_gpu else None,
        prefetch_queue_depth=ahead,
        exec_dynamic=True,
    )
    with pipeline:
        data, anchor, shape = fn.external_source(source=feed, num_outputs=3, batch=True)
        windows = _windows(data, anchor, shape, encoded, on_gpu)
        pipeline.set_outputs(_finished(windows, preprocessing) if on_gpu else windows)
    return pipeline


def _windows(data: Any, anchor: Any, shape: Any, encoded: bool, on_gpu: bool) -> Any:
    """uint8 (height, width, 3) each."""
    absolute: dict[str, Any] = {"normalized_anchor": False, "normalized_shape": False, "axis_names": "WH"}
    if not encoded:
        data = fn.reinterpret(data, layout="HWC")
        return fn.slice(data.gpu() if on_gpu else data, anchor, shape, **absolute)
    return fn.decoders.image_slice(
        data,
        anchor,
        shape,
        device="mixed" if on_gpu else "cpu",
        output_type=types.DALIImageType.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # on GPUs too, as libjpeg does on CPUs
        hw_decoder_load=_HARDWARE_SHARE,
        **absolute,
    )


def _finished(windows: Any, preprocessing: Preprocessing) -> Any:
    """What `hvd_lb.data.loading.resize` does on CPUs, but for augmentations: float32 (S, S, 3) each."""
    resized: Any = fn.resize(
        windows,
        size=[preprocessing.image_size, preprocessing.image_size],
        interp_type=types.DALIInterpType.INTERP_LINEAR,
        antialias=preprocessing.antialias,
    )
    return fn.crop_mirror_normalize(
        resized,
        dtype=types.DALIDataType.FLOAT,
        output_layout="HWC",
        mean=[255 * value for value in preprocessing.mean],
        std=[255 * value for value in preprocessing.std],
    )


class _Single:
    """Finds the images that DALI refuses, one by one, in a pipeline that is made anew only after such a one."""

    def __init__(self, images: Images, preprocessing: Preprocessing, device: torch.device) -> None:
        self._images, self._preprocessing, self._device = images, preprocessing, device
        self._one: RawBatch
        self._pipeline: Pipeline | None = None

    def without_refused(self, batch: RawBatch) -> RawBatch:
        """The batch with what PIL makes of the images that are refused; itself where there are none."""
        data = [self._content(batch.single(position)) for position in range(len(batch.data))]
        same = all(found is given for found, given in zip(data, batch.data, strict=True))
        return batch if same else replace(batch, data=data)

    def _content(self, one: RawBatch) -> Content:
        image_id, (content,) = int(one.microbatch.image_ids[0]), one.data
        cause = self._refusal(one)
        if not cause or isinstance(content, BadImage):
            return content
        pixels_already = not self._images.encoded or content[:2].tobytes() == b"P6"
        if pixels_already or re.search("alloc|memory|CUDA", cause):
            raise HostError(f"DALI failed on {self._images.name(image_id)}: {cause}")
        try:
            return as_pixels(self._images, image_id, content)
        except BadImage as bad:
            return bad

    def _refusal(self, one: RawBatch) -> str:
        """Why an image is refused, or nothing."""
        self._one = one
        self._pipeline = self._pipeline or _pipeline(
            lambda: _inputs(self._one), self._images.encoded, self._preprocessing, 1, self._device, 1, ahead=1
        )
        try:
            self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None
            return _cause(error)
        return ""


def _cause(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened; it follows a traceback of the pipeline's making."""
    _, _, after = str(error).partition("encountered:")
    return next(
        (line.strip() for line in (after or str(error)).splitlines() if line.strip()), "no reason given"
    )
