"""The torchvision loader: the reference for DALI's pixels, and what runs where DALI does not.

PIL decodes; windows are resized as 8-bit tensors. On CPUs DALI's loader does the same with what it has decoded, so no
bit differs (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from hvd_lb.data.decoding.decode import BadImage, decode_image
from hvd_lb.data.decoding.stand_in import RawBatch, Repair
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Decode, Decoded, Preprocessing
from hvd_lb.data.loading.device import loading_stream
from hvd_lb.data.loading.resize import Finisher, resize
from hvd_lb.plan.augment import Windows

Finish = Callable[[Sequence[np.ndarray], Windows], torch.Tensor]


def torchvision_decoder(
    images: Images,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    threads: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Decode:
    """Decodes and resizes on the CPU with `threads` threads; for a GPU the microbatch is normalised there."""

    def decode(batches: Iterator[RawBatch], repair: Repair) -> Iterator[Decoded]:
        def cut(batch: RawBatch) -> list[np.ndarray | BadImage]:
            decode_in = pool.map if images.encoded else map
            return list(decode_in(partial(_window, images, batch), range(len(batch.data))))

        stream = loading_stream(device) if device.type == "cuda" else None
        with ThreadPoolExecutor(threads, "hvd-lb torchvision") as pool, torch.cuda.stream(stream):
            finish = (
                on_device(preprocessing, device, pool, memory_format)
                if stream
                else Finisher(preprocessing, batch_size, pool)
            )
            for batch in batches:
                crops = cut(batch)
                if bad := {position: of for position, of in enumerate(crops) if isinstance(of, BadImage)}:
                    batch = repair(batch, bad)
                    crops = cut(batch)
                whole = [of for of in crops if not isinstance(of, BadImage)]
                x = finish(whole, batch.microbatch.windows)
                y = torch.from_numpy(images.labels[batch.microbatch.image_ids]).to(device)
                if stream:
                    stream.synchronize()
                yield Decoded(x, y, batch.stand_ins)

    return decode


def on_device(
    preprocessing: Preprocessing, device: torch.device, pool: Executor, memory_format: torch.memory_format
) -> Finish:
    """A Finisher that normalises on `device`, a GPU: what goes there are the levels, from pinned memory."""
    # In DALI's arithmetic, of levels and with the reciprocal.
    mean, std = (
        torch.tensor([255 * value for value in of], dtype=torch.float32, device=device).view(3, 1, 1)
        for of in (preprocessing.mean, preprocessing.std)
    )
    size = preprocessing.image_size

    def finish(crops: Sequence[np.ndarray], windows: Windows) -> torch.Tensor:
        levels = torch.empty(len(crops), size, size, 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
        rows = levels.numpy()

        def fill(position: int) -> None:
            rows[position] = windows.augmented(resize(crops[position], preprocessing), position)

        list(pool.map(fill, range(len(crops))))
        x = levels.to(device, non_blocking=True).permute(0, 3, 1, 2)
        return x.to(torch.float32, memory_format=memory_format).sub_(mean).mul_(1 / std)

    return finish


def _window(images: Images, batch: RawBatch, position: int) -> np.ndarray | BadImage:
    """uint8 (height, width, 3): the window of one image."""
    windows = batch.microbatch.windows
    x, y, width, height = (int(of[position]) for of in (windows.x, windows.y, windows.width, windows.height))
    source = batch.data[position]
    if images.encoded and not isinstance(source, BadImage):
        try:
            source = decode_image(images, int(batch.microbatch.image_ids[position]), source)
        except BadImage as bad:
            return bad
    return source if isinstance(source, BadImage) else source[y : y + height, x : x + width]
