"""Memory that several processes of one machine see: files without a name (memfd), which end with their last user.

Nothing is left in a file system after a SIGKILL, and the 64 MB that a container has at /dev/shm are no limit.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

# Of marks: signed integers of 64 bits, in a page of their own. Only the process that has made a segment writes them.
_MARKS = 8


class Segment:
    """So many numbers, zeros at first, and marks after them."""

    def __init__(self, file: str, count: int, dtype: torch.dtype) -> None:
        # Its file is closed again. (Python's mmap keeps one open for each, which 3.13 can be told not to.)
        self._memory = torch.from_file(file, shared=True, size=_bytes(count, dtype), dtype=torch.uint8)
        self._count, self._dtype = count, dtype
        self.marks = self._memory[-mmap.PAGESIZE :].view(torch.int64)[:_MARKS].numpy()

    def numbers(self) -> Tensor:
        """All of them; the memory is there as long as any tensor of it."""
        return self._memory[: self._count * self._dtype.itemsize].view(self._dtype)

    @classmethod
    def of_process(cls, pid: int, descriptor: int, count: int, dtype: torch.dtype) -> Segment:
        """One that another process has made; OSError where that has ended, or is not to be looked into."""
        file = f"/proc/{pid}/fd/{descriptor}"
        if os.stat(file).st_size != _bytes(count, dtype):
            raise OSError(f"{file} is another file")
        try:
            return cls(file, count, dtype)
        except RuntimeError as error:
            raise OSError(str(error)) from None


class OwnSegment(Segment):
    """One of this process, which others find by its number and `descriptor`, until that is closed."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.descriptor: int | None = os.memfd_create("hvd-lb sums")
        os.truncate(self.descriptor, _bytes(count, dtype))
        super().__init__(f"/proc/self/fd/{self.descriptor}", count, dtype)

    def close(self) -> None:
        """No other process comes any more."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    __del__ = close


def _bytes(count: int, dtype: torch.dtype) -> int:
    """Whole pages of numbers, and the one of the marks."""
    return (-(-count * dtype.itemsize // mmap.PAGESIZE) + 1) * mmap.PAGESIZE
