"""The DALI loader: one pipeline that decodes, cuts, resizes, mirrors and normalises what the plan says.

One iteration of the pipeline is one microbatch: on GPUs the share decoded by hardware depends on the batch,
so the pixels of a microbatch would else depend on its neighbours. None of DALI's own randomness, shuffling or
sharding is used. On CUDA the JPEGs are decoded there ("mixed"); it is the same pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from hvd_lb.data.decode import decode_image
from hvd_lb.data.images import Images
from hvd_lb.data.loader import Batch, Decode, Pixels, RawBatch
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch, Windows

_PREFETCH = 2


def dali_decoder(pixels: Pixels, batch_size: int, device: torch.device, threads: int) -> Decode:
    """Decodes on `device` with `threads` CPU threads."""

    def decode(images: Images, batches: Iterator[RawBatch]) -> Iterator[Batch]:
        feed = _Feed(batches)
        pipeline = _pipeline(feed, images.encoded, pixels, batch_size, device, threads)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        while True:
            try:
                (output,) = pipeline.run(stream)
            except StopIteration:
                break
            except RuntimeError as error:
                if not feed.in_flight:  # the pipeline itself could not be made
                    raise
                raise _blame(images, feed.in_flight[0], pixels, error) from error
            batch = feed.in_flight.pop(0)
            y = torch.from_numpy(images.labels[batch.microbatch.image_ids])
            # No copy on the CPU: DALI's dynamic executor recycles no output while a tensor refers to it.
            x = torch.from_dlpack(output.as_tensor())
            if stream is not None:
                # On a GPU Python may let go before the consumer's kernels have run; only torch's own
                # allocator can wait for those (record_stream in ThreadedLoader).
                with torch.cuda.stream(stream):
                    x, y = x.clone(), y.to(device)
                stream.synchronize()
            yield x, y
        if feed.failure is not None:
            raise feed.failure

    return decode


class _Feed:
    """Gives the pipeline its inputs; what the reading raises waits until the batches before it are out."""

    def __init__(self, batches: Iterator[RawBatch]) -> None:
        self._batches = batches
        self.in_flight: list[RawBatch] = []
        self.failure: Exception | None = None

    def __call__(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise StopIteration from error
        self.in_flight.append(batch)
        windows = batch.microbatch.windows
        anchor = np.stack([windows.x, windows.y], axis=1)
        shape = np.stack([windows.width, windows.height], axis=1)
        return batch.data, anchor, shape, windows.flip.astype(np.int32)


def _pipeline(
    feed: _Feed, encoded: bool, pixels: Pixels, batch_size: int, device: torch.device, threads: int
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
        data, anchor, shape, mirror = fn.external_source(source=feed, num_outputs=4, batch=True)
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
        resized: Any = fn.resize(
            cut,
            size=[pixels.image_size, pixels.image_size],
            interp_type=types.DALIInterpType.INTERP_LINEAR,
            antialias=pixels.antialias,
        )
        pipeline.set_outputs(
            fn.crop_mirror_normalize(
                resized,
                mirror=mirror,
                dtype=types.DALIDataType.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in pixels.mean],
                std=[255 * value for value in pixels.std],
            )
        )
    return pipeline


def _blame(images: Images, batch: RawBatch, pixels: Pixels, error: RuntimeError) -> UserError:
    """Names the image at fault. DALI itself names none of some kinds, so the batch is decoded one by one."""
    ids = [int(image_id) for image_id in batch.microbatch.image_ids]
    for image_id, content in zip(ids, batch.data, strict=True):
        if images.encoded:
            try:
                decode_image(images, image_id, content)
            except UserError as found:
                return found
    for index, image_id in enumerate(ids):
        alone = _Feed(iter([_single(batch, index)]))
        try:
            _pipeline(alone, images.encoded, pixels, 1, torch.device("cpu"), 1).run()
        except RuntimeError as reason:
            return UserError(
                f"{images.name(image_id)}: DALI cannot decode it, PIL can ({_cause(reason)}); "
                "convert it, or use --loader torchvision"
            )
    return UserError(f"DALI failed on {images.name(ids[0])} and the {len(ids) - 1} after it: {_cause(error)}")


def _cause(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened; it follows a traceback of the pipeline's making."""
    _, _, after = str(error).partition("encountered:")
    return next(
        (line.strip() for line in (after or str(error)).splitlines() if line.strip()), "no reason given"
    )


def _single(batch: RawBatch, index: int) -> RawBatch:
    windows = batch.microbatch.windows
    one = slice(index, index + 1)
    return RawBatch(
        Microbatch(
            batch.microbatch.image_ids[one],
            Windows(
                windows.x[one], windows.y[one], windows.width[one], windows.height[one], windows.flip[one]
            ),
        ),
        batch.data[one],
    )
