"""Numbers on their way from a device to the host."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, float)


class Arriving(Generic[Number]):
    """A few numbers of this `kind`, for which the host need not wait at once: it may have more to do for the device."""

    def __init__(self, numbers: Tensor, kind: type[Number]) -> None:
        self._kind: type[Number] = kind
        self._numbers = numbers.to("cpu", copy=True, non_blocking=True)
        self._event = torch.cuda.current_stream().record_event() if numbers.is_cuda else None

    def wait(self) -> list[Number]:
        if self._event:
            self._event.synchronize()
        return list(map(self._kind, self._numbers.tolist()))
