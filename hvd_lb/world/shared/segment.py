"""Memory that several processes of one machine see: files without a name (memfd), which end with their last user.

Nothing is left in a file system after a SIGKILL, and the 64 MB that a container has at /dev/shm are no limit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of marks: signed integers of 64 bits, in a page of their own. Only the process that has made a segment writes them.
_MARKS = 8
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Segment:
    """So many numbers, zeros at first, and marks after them. OSError where there is no room, or another file."""

    def __init__(self, descriptor: int, count: int, dtype: torch.dtype) -> None:
        size = _bytes(count, dtype)
        if os.fstat(descriptor).st_size != size:
            raise OSError("it is another file")
        memory = _mapped(descriptor, size)
        self._numbers, self._dtype = memory[: count * dtype.itemsize], dtype
        self.marks = memory[-mmap.PAGESIZE :].view(np.int64)[:_MARKS]

    def numbers(self) -> Tensor:
        """All of them; the memory is there as long as any tensor of it."""
        return torch.from_numpy(self._numbers).view(self._dtype)

    @classmethod
    def of_process(cls, pid: int, descriptor: int, count: int, dtype: torch.dtype) -> Segment:
        """One that another process has made; OSError where that has ended, or is not to be looked into."""
        opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(opened, count, dtype)
        finally:
            os.close(opened)


class OwnSegment(Segment):
    """One of this process, which others find by its number and `descriptor`, until that is closed."""

    descriptor: int | None = None

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.descriptor = os.memfd_create("hvd-lb sums")
        os.truncate(self.descriptor, _bytes(count, dtype))
        super().__init__(self.descriptor, count, dtype)

    def close(self) -> None:
        """No other process comes any more."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    __del__ = close


def _bytes(count: int, dtype: torch.dtype) -> int:
    """Whole pages of numbers, and the one of the marks."""
    return (-(-count * dtype.itemsize // mmap.PAGESIZE) + 1) * mmap.PAGESIZE


def _mapped(descriptor: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The file's bytes, as long as anybody uses them, also when it is closed.

    Python's mmap would keep a descriptor for each, which 3.13 can be told not to. Tensors of torch.from_file, too, live
    without; but torch.multiprocessing takes them for shared with whomever they are sent to, and fails.
    """
    address = _LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    return memory
