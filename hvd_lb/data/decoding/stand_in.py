"""What becomes of images that cannot be decoded: the run ends, or another image stands in (docs/data.md).

The stand-in for image i is the first of i + 1, i + 2, … (modulo N) that can be decoded, with its own label and its own
window in that epoch: a function of the plan, whichever process finds it. Whether an image can be decoded is a matter
of its bytes and of PIL, for every loader (`decode`), and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hvd_lb.data.decoding.decode import BadImage, decode_image
from hvd_lb.data.images import Images
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch, Origin

MOST_TRIES = 100
"""So many broken images in a row are no accident."""

Content = np.ndarray | BadImage
"""What was read for an image: as `Images.read` gives it or prepared for a decoder, or why that cannot be done."""


@dataclass(frozen=True)
class StandIn:
    """The image at `position` of a microbatch was bad; another one, given by its id and path, was used instead."""

    origin: Origin | None
    position: int
    image: int
    path: str
    reason: str
    stand_in: int
    stand_in_path: str


OnStandIns = Callable[[Sequence[StandIn]], None]


@dataclass(frozen=True)
class RawBatch:
    """A microbatch and what was read for it: one array an image, or why that image is bad."""

    microbatch: Microbatch
    data: list[Content]
    stand_ins: tuple[StandIn, ...] = ()

    def bad(self) -> dict[int, BadImage]:
        """By position in the microbatch."""
        return {position: of for position, of in enumerate(self.data) if isinstance(of, BadImage)}

    def single(self, position: int) -> RawBatch:
        """The batch of one image."""
        one = slice(position, position + 1)
        windows = self.microbatch.windows.single(position)
        return RawBatch(Microbatch(self.microbatch.image_ids[one], windows), self.data[one])


class Repair(Protocol):
    """Makes a batch without bad images of one in which those at some positions are bad."""

    def __call__(self, batch: RawBatch, bad: dict[int, BadImage]) -> RawBatch: ...


def refuse(batch: RawBatch, bad: dict[int, BadImage]) -> RawBatch:
    """A `Repair` that ends the run with the path, the reason and the step of the first bad image."""
    first = bad[min(bad)]
    if batch.microbatch.origin is None:
        raise first
    raise UserError(
        f"{first.name}: cannot be decoded ({first.reason}), in {batch.microbatch.origin}; "
        "repair or remove it, or --on-bad-image skip"
    )


@dataclass(frozen=True)
class Substitute:
    """A `Repair` that puts stand-ins in; `read` reads images by their ids."""

    images: Images
    read: Callable[[np.ndarray], list[Content]]

    def __call__(self, batch: RawBatch, bad: dict[int, BadImage]) -> RawBatch:
        microbatch = batch.microbatch
        ids, data = microbatch.image_ids.copy(), list(batch.data)
        windows = microbatch.windows
        found = list(batch.stand_ins)
        for position, why in sorted(bad.items()):
            image = int(ids[position])
            stand_in = self._first_good(image, why, microbatch)
            ids[position], data[position] = stand_in.microbatch.image_ids[0], stand_in.data[0]
            windows = windows.replaced(position, stand_in.microbatch.windows)
            chosen = int(ids[position])
            found.append(
                StandIn(
                    microbatch.origin,
                    position,
                    image,
                    self.images.name(image),
                    why.reason,
                    chosen,
                    self.images.name(chosen),
                )
            )
        found.sort(key=lambda stand_in: stand_in.position)
        repaired = Microbatch(ids, windows, microbatch.origin, microbatch.draw)
        return RawBatch(repaired, data, tuple(found))

    def _first_good(self, image: int, why: BadImage, microbatch: Microbatch) -> RawBatch:
        for one in self._candidates(image, microbatch):
            if self._decodes(one):
                return one
        tries = min(MOST_TRIES, len(self.images) - 1)
        raise UserError(f"{why}: none of the {tries} images after it can be decoded either")

    def _decodes(self, one: RawBatch) -> bool:
        (content,) = one.data
        if isinstance(content, BadImage) or not self.images.encoded:
            return not isinstance(content, BadImage)
        try:
            decode_image(self.images, int(one.microbatch.image_ids[0]), content)
        except BadImage:
            return False
        return True

    def _candidates(self, image: int, microbatch: Microbatch) -> Iterator[RawBatch]:
        if microbatch.draw is None:
            raise ValueError("a microbatch without `draw` has no windows for stand-ins")
        for offset in range(1, min(MOST_TRIES + 1, len(self.images))):
            ids = np.array([(image + offset) % len(self.images)])
            windows = microbatch.draw(ids, *sizes(self.images, ids))
            yield RawBatch(Microbatch(ids, windows, microbatch.origin), self.read(ids))


def sizes(images: Images, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights to compute windows from; 1 where the index has none, as the image is bad anyway."""
    return np.maximum(images.widths[ids], 1), np.maximum(images.heights[ids], 1)
