"""The DALI loader: a pipeline that decodes and cuts what the plan says and, on GPUs, resizes and normalises.

On CPUs `hvd_lb.data.loading.resize` does the rest, many times as fast. On CUDA the JPEGs are decoded there ("mixed").
One iteration of the pipeline is one microbatch: on GPUs the share decoded by hardware depends on the batch,
so the pixels of a microbatch would else depend on its neighbours. None of DALI's own randomness, shuffling or
sharding is used.

One image that DALI cannot decode costs it the batches under way and the pipeline. DALI does not always tell which one
it was, so the images of the batch are decoded one by one, with their windows; then a new pipeline starts over with it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from hvd_lb.data.decoding.decode import BadImage, decode_image
from hvd_lb.data.decoding.stand_in import RawBatch, Repair
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Decode, Decoded, Preprocessing
from hvd_lb.data.loading.resize import Finisher
from hvd_lb.errors import UserError

_PREFETCH = 2


def dali_decoder(preprocessing: Preprocessing, batch_size: int, device: torch.device, threads: int) -> Decode:
    """Decodes image files on `device` with `threads` CPU threads; for GPUs it takes decoded images, too."""

    def decode(images: Images, batches: Iterator[RawBatch], repair: Repair) -> Iterator[Decoded]:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        outputs = _outputs(images, batches, repair, preprocessing, batch_size, device, threads, stream)
        if stream is not None:
            return _on_gpu(images, outputs, stream)
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


def _on_gpu(images: Images, outputs: Outputs, stream: torch.cuda.Stream) -> Iterator[Decoded]:
    for batch, output in outputs:
        # Python may let go of DALI's memory before the consumer's kernels have run; only torch's own allocator can wait
        # for those (record_stream in ThreadedLoader).
        with torch.cuda.stream(stream):
            x = batch.microbatch.windows.augmented_batch(torch.from_dlpack(output.as_tensor()).clone())
            y = torch.from_numpy(images.labels[batch.microbatch.image_ids]).to(stream.device)
        stream.synchronize()
        yield Decoded(x, y, batch.stand_ins)


def _outputs(
    images: Images,
    batches: Iterator[RawBatch],
    repair: Repair,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    threads: int,
    stream: torch.cuda.Stream | None,
) -> Outputs:
    def trial(one: RawBatch) -> BadImage | None:
        return _trial(images, one, preprocessing, device)

    feed = _Feed(batches, lambda batch, bad: repair(batch, bad, trial))
    pipeline = _pipeline(feed, images.encoded, preprocessing, batch_size, device, threads)
    while True:
        try:
            output = pipeline.run(stream)[0]
        except StopIteration:
            break
        except RuntimeError as error:
            if not feed.in_flight:  # the pipeline itself could not be made
                raise
            feed.in_flight[0] = repair(*_blame(images, feed.in_flight[0], trial, error), trial)
            feed.rewind()
            pipeline = _pipeline(feed, images.encoded, preprocessing, batch_size, device, threads)
            continue
        yield feed.in_flight.popleft(), output
    if feed.failure is not None:
        raise feed.failure


class _Feed:
    """Gives the pipeline its inputs; what the reading raises waits until the batches before it are out."""

    def __init__(
        self, batches: Iterator[RawBatch], repair: Callable[[RawBatch, dict[int, BadImage]], RawBatch]
    ) -> None:
        self._batches, self._repair = batches, repair
        self._again: deque[RawBatch] = deque()
        self.in_flight: deque[RawBatch] = deque()
        self.failure: Exception | None = None

    def rewind(self) -> None:
        """What is in flight is given to the next pipeline again."""
        self._again.extendleft(reversed(self.in_flight))
        self.in_flight.clear()

    def __call__(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        batch = self._again.popleft() if self._again else self._next()
        self.in_flight.append(batch)
        windows = batch.microbatch.windows
        anchor = np.stack([windows.x, windows.y], axis=1)
        shape = np.stack([windows.width, windows.height], axis=1)
        data = [content for content in batch.data if not isinstance(content, BadImage)]
        return data, anchor, shape

    def _next(self) -> RawBatch:
        if self.failure is not None:
            raise StopIteration
        try:
            batch = next(self._batches)
            bad = batch.bad()
            return self._repair(batch, bad) if bad else batch
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise StopIteration from error


def _pipeline(
    feed: _Feed,
    encoded: bool,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    threads: int,
) -> Pipeline:
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size,
        threads,
        device.index if on_gpu else None,
        prefetch_queue_depth=_PREFETCH,
        exec_dynamic=True,
    )
    absolute: dict[str, Any] = {"normalized_anchor": False, "normalized_shape": False, "axis_names": "WH"}
    with pipeline:
        data, anchor, shape = fn.external_source(source=feed, num_outputs=3, batch=True)
        if encoded:
            cut = fn.decoders.image_slice(
                data,
                anchor,
                shape,
                device="mixed" if on_gpu else "cpu",
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # on GPUs too, as libjpeg does on CPUs
                **absolute,
            )
        else:
            data = fn.reinterpret(data, layout="HWC")
            cut = fn.slice(data.gpu() if on_gpu else data, anchor, shape, **absolute)
        pipeline.set_outputs(_finished(cut, preprocessing) if on_gpu else cut)
    return pipeline


def _finished(windows: Any, preprocessing: Preprocessing) -> Any:
    """What `hvd_lb.data.loading.resize` does on CPUs, but for augmentations."""
    resized: Any = fn.resize(
        windows,
        size=[preprocessing.image_size, preprocessing.image_size],
        interp_type=types.DALIInterpType.INTERP_LINEAR,
        antialias=preprocessing.antialias,
    )
    return fn.crop_mirror_normalize(
        resized,
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in preprocessing.mean],
        std=[255 * value for value in preprocessing.std],
    )


def _blame(
    images: Images, batch: RawBatch, trial: Callable[[RawBatch], BadImage | None], error: RuntimeError
) -> tuple[RawBatch, dict[int, BadImage]]:
    """The batch and which of its images fail alone, too. UserError where none does."""
    tried = ((position, trial(batch.single(position))) for position in range(len(batch.data)))
    bad = {position: found for position, found in tried if found is not None}
    if not bad:
        first = images.name(int(batch.microbatch.image_ids[0]))
        raise UserError(
            f"DALI failed on {first} and the {len(batch.data) - 1} after it: {_cause(error)}"
        ) from error
    return batch, bad


def _trial(
    images: Images, one: RawBatch, preprocessing: Preprocessing, device: torch.device
) -> BadImage | None:
    """What is wrong with the one image of this batch. UserError where it is the machine that failed."""
    alone = _Feed(iter([one]), lambda batch, bad: batch)
    try:
        _pipeline(alone, images.encoded, preprocessing, 1, device, 1).run()
    except RuntimeError as error:
        cause = _cause(error)
        if not images.encoded or re.search("alloc|memory|CUDA", cause):
            name = images.name(int(one.microbatch.image_ids[0]))
            raise UserError(f"DALI failed on {name}: {cause}") from error
        return _reason(images, one, cause)
    return None


def _reason(images: Images, one: RawBatch, cause: str) -> BadImage:
    """Why DALI cannot decode an image: in PIL's words where PIL cannot either, as DALI's are less clear."""
    image_id, (content,) = int(one.microbatch.image_ids[0]), one.data
    if not isinstance(content, BadImage):
        try:
            decode_image(images, image_id, content)
        except BadImage as bad:
            return bad
    return BadImage(images.name(image_id), f"by DALI, though PIL can: {cause}")


def _cause(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened; it follows a traceback of the pipeline's making."""
    _, _, after = str(error).partition("encountered:")
    return next(
        (line.strip() for line in (after or str(error)).splitlines() if line.strip()), "no reason given"
    )
