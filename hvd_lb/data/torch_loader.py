"""The torchvision loader: the reference for DALI's pixels, and what runs where DALI does not.

Windows are resized as tensors, not by PIL, which always antialiases; where both do they agree to 0-1 levels.
DALI agrees to 0-1 levels too, except in the outermost pixels of an antialiased tensor: where the filter reaches
over the window's edge DALI repeats pixels and torchvision reweighs. Without resizing nothing differs (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torchvision.transforms.v2 import functional as F  # noqa: N812 (its name everywhere)

from hvd_lb.data.decode import BadImage, decode_image
from hvd_lb.data.images import Images
from hvd_lb.data.loader import Decode, Decoded, Pixels
from hvd_lb.data.stand_in import Mend, RawBatch


def torchvision_decoder(pixels: Pixels, batch_size: int, device: torch.device, threads: int) -> Decode:
    """Decodes on the CPU with `threads` threads, moves the microbatch to `device` and normalises it there."""
    # In DALI's arithmetic, of levels and with the reciprocal, so that no bit differs on a CPU.
    mean, std = (
        torch.tensor([255 * value for value in of], dtype=torch.float32, device=device).view(3, 1, 1)
        for of in (pixels.mean, pixels.std)
    )

    def decode(images: Images, batches: Iterator[RawBatch], mend: Mend) -> Iterator[Decoded]:
        def trial(one: RawBatch) -> BadImage | None:
            cut = _cut(images, one, 0, pixels)
            return cut if isinstance(cut, BadImage) else None

        def cut_all(batch: RawBatch) -> list[torch.Tensor | BadImage]:
            return list(
                pool.map(lambda position: _cut(images, batch, position, pixels), range(len(batch.data)))
            )

        with ThreadPoolExecutor(threads, "hvd-lb torchvision") as pool:
            for batch in batches:
                cut = cut_all(batch)
                if bad := {position: of for position, of in enumerate(cut) if isinstance(of, BadImage)}:
                    batch = mend(batch, bad, trial)
                    cut = cut_all(batch)
                whole = [tensor for tensor in cut if not isinstance(tensor, BadImage)]
                x = torch.stack(whole).to(device).float().sub_(mean).mul_(1 / std)
                y = torch.from_numpy(images.labels[batch.microbatch.image_ids]).to(device)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                yield Decoded(x, y, batch.stand_ins)

    return decode


def _cut(images: Images, batch: RawBatch, position: int, pixels: Pixels) -> torch.Tensor | BadImage:
    """uint8 (3, S, S): the window of one image, resized and perhaps mirrored."""
    windows = batch.microbatch.windows
    x, y, width, height = (int(of[position]) for of in (windows.x, windows.y, windows.width, windows.height))
    source = batch.data[position]
    if images.encoded and not isinstance(source, BadImage):
        try:
            source = decode_image(images, int(batch.microbatch.image_ids[position]), source)
        except BadImage as bad:
            return bad
    if isinstance(source, BadImage):
        return source
    window = torch.from_numpy(source[y : y + height, x : x + width].copy()).permute(2, 0, 1)
    resized = F.resize(window, [pixels.image_size, pixels.image_size], antialias=pixels.antialias)
    return F.horizontal_flip(resized) if windows.flip[position] else resized
