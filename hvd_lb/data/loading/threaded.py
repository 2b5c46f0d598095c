"""The Loader around a decoding generator: threads read ahead of it, and one decodes ahead of the consumer."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch

from hvd_lb.data.decoding.stand_in import OnStandIns, Repair
from hvd_lb.data.loading.contract import PREFETCH, Batch, Decode
from hvd_lb.data.loading.raw_batches import RawBatches
from hvd_lb.data.loading.readahead import ReadAhead


class ThreadedLoader:
    """Decodes `batches` ahead, and closes them, too."""

    def __init__(
        self,
        batches: RawBatches,
        decode: Decode,
        repair: Repair,
        on_stand_ins: OnStandIns,
        prefetch: int = PREFETCH,
    ) -> None:
        self._on_stand_ins = on_stand_ins
        self._ready = ReadAhead(decode(batches, repair), prefetch, "hvd-lb decode")
        self._close = weakref.finalize(self, _close, batches, self._ready)  # also when it is just dropped
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
            self._on_stand_ins(stand_ins)
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


def _close(batches: RawBatches, ready: ReadAhead) -> None:
    """In this order: the decoder may be waiting for what is read."""
    batches.close()
    ready.close()
