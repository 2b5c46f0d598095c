"""What loaders and decoders agree on: the stream of microbatches that goes in, the tensors that come out.

A loader knows nothing of epochs, ranks or processes: it executes a stream of microbatches (image ids, crop
windows, augmentations), which the plan made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from hvd_lb.data.decoding.stand_in import RawBatch, Repair, StandIn
from hvd_lb.data.images import Images

Batch = tuple[torch.Tensor, torch.Tensor]

PREFETCH = 2


@dataclass(frozen=True)
class Preprocessing:
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
    """Iterates (x float32 (b, 3, S, S), y int64 (b,)) on the device, in the microbatches' order.

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


Decode = Callable[[Iterator[RawBatch], Repair], Iterator[Decoded]]
"""Turns what was read of some images into tensors on the device, in order; one generator a loader."""

Prepare = Callable[[Images, int, np.ndarray], np.ndarray]
"""Makes of an image file's bytes what the decoder takes; BadImage where it is found out that they are broken."""
