"""Blocks of objects on a local disk, shared by all processes of the host and kept for the next run.

    CACHE/remote/KEY      checksums of the blocks (0: not there), then the blocks, each at its place: a sparse file

KEY stands for address and ETag, so a file never has blocks of two versions. Writers need no lock: all write the same
bytes, the checksum last. Who uses a file holds a shared lock on it, and only files that nobody has locked are removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from hvd_lb.data.remote.address import Address
from hvd_lb.data.remote.store import ObjectState
from hvd_lb.errors import UserError
from hvd_lb.machine.cache_folder import cache_folder

LIMIT = "HVD_LB_DATA_CACHE"
BLOCK = 1 << 16
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?")
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_PAGE = 4096


class Blocks:
    """The cached blocks of one object of `size` bytes at `path`; OSError where there can be none."""

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self._count = -(-size // BLOCK)
        self._at = -(-4 * self._count // _PAGE) * _PAGE  # where the blocks begin
        self._checked = np.zeros(self._count, bool)  # by this process
        self._full = False
        self._descriptor = -1
        self._descriptor = _locked(path, self._at + size)

    def get(self, start: int, stop: int) -> np.ndarray | None:
        """uint8 (stop − start,); None where a block of it is not there, or is damaged."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        if not self._checked[first:last].all() and not self._check(first, last):
            return None
        with suppress(OSError):
            found = os.pread(self._descriptor, stop - start, self._at + start)
            if len(found) == stop - start:
                return np.frombuffer(found, np.uint8)
        return None

    def missing(self, start: int, stop: int) -> tuple[int, int]:
        """From the first to the last block that `start` … `stop` needs and is not there; empty where all are."""
        first = start // BLOCK
        absent = np.flatnonzero(self._sums(first, -(-stop // BLOCK)) == 0)
        if not len(absent):
            return start, start
        return (first + int(absent[0])) * BLOCK, min(self._size, (first + int(absent[-1]) + 1) * BLOCK)

    def put(self, start: int, content: np.ndarray) -> None:
        """Whole blocks from `start` on; that no more fits on the disk is told once and changes nothing else."""
        if self._full:
            return
        blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
        sums = np.array([zlib.crc32(block.data) or 1 for block in blocks], "<u4")
        try:
            _write(self._descriptor, content.data, self._at + start)
            _write(self._descriptor, sums.data.cast("B"), 4 * (start // BLOCK))
        except OSError as error:
            self._full = True
            _tell_once(f"the cache of remote data takes no more ({error.strerror}); training goes on without")
            return
        self._checked[start // BLOCK : start // BLOCK + len(blocks)] = True

    def drop(self, start: int, stop: int) -> None:
        """These are not the right bytes."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        self._checked[first:last] = False
        with suppress(OSError):
            _write(self._descriptor, memoryview(bytes(4 * (last - first))), 4 * first)

    def _check(self, first: int, last: int) -> bool:
        for block, known in enumerate(self._sums(first, last).tolist(), start=first):
            if self._checked[block]:
                continue
            if known:
                length = min(BLOCK, self._size - block * BLOCK)
                with suppress(OSError):
                    found = os.pread(self._descriptor, length, self._at + block * BLOCK)
                    self._checked[block] = len(found) == length and (zlib.crc32(found) or 1) == known
            if not self._checked[block]:
                if known:
                    self.drop(block * BLOCK, block * BLOCK + 1)
                return False
        return True

    def _sums(self, first: int, last: int) -> np.ndarray:
        """uint32 (last − first,)."""
        found = b""
        with suppress(OSError):
            found = os.pread(self._descriptor, 4 * (last - first), 4 * first)
        return np.frombuffer(found.ljust(4 * (last - first), b"\0"), "<u4")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def open_blocks(addresses: Sequence[Address], states: Sequence[ObjectState]) -> list[Blocks | None]:
    """The caches of these objects, None where one is to have none: the first ones that fit into what is allowed.

    So of data larger than that a fixed part is cached; replacing the oldest would lose what the next epoch needs. What
    others left, and nobody uses now, is removed for it. UserError for a limit that is no size.
    """
    folder = cache_folder() / "remote"
    limit = _limit()
    if limit == 0:
        return [None] * len(addresses)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = [folder / _key(address, state) for address, state in zip(addresses, states, strict=True)]
        left = _make_room(folder, set(own), limit, sum(state.size for state in states))
    except OSError as error:
        _tell_once(f"{folder}: remote data are not cached ({error.strerror})")
        return [None] * len(addresses)
    opened: list[Blocks | None] = []
    for path, state in zip(own, states, strict=True):
        blocks = None
        if 0 < state.size <= left:
            with suppress(OSError):
                blocks = Blocks(path, state.size)
                left -= state.size
        opened.append(blocks)
    return opened


def _key(address: Address, state: ObjectState) -> str:
    return hashlib.sha256(os.fsencode(f"{address}\0{state.size}\0{state.tag}")).hexdigest()[:32]


def _make_room(folder: Path, own: set[Path], limit: float | None, wanted: int) -> float:
    """How many bytes of `own` files may be kept, after others that nobody uses were removed for them, oldest first."""
    there: dict[Path, os.stat_result] = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process makes room, too
            there[path] = path.stat()
    if limit is None:
        taken = sum(stat.st_blocks * 512 for stat in there.values())
        limit = (shutil.disk_usage(folder).free + taken) / 2
    others = {path: stat for path, stat in there.items() if path not in own}
    used = sum(stat.st_size for stat in others.values())
    for path, stat in sorted(others.items(), key=lambda of: of[1].st_mtime_ns):
        if used + wanted <= limit:
            break
        if _discard(path):
            used -= stat.st_size
    return max(0.0, limit - used)


def _discard(path: Path) -> bool:
    """Remove a file that nobody uses; whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _locked(path: Path, size: int) -> int:
    """A descriptor of the file, made where it is not there, with a shared lock where the file system has locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
            with suppress(FileNotFoundError):  # removed before it was locked
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    if os.fstat(descriptor).st_size != size:
                        os.ftruncate(descriptor, size)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def _limit() -> float | None:
    """Bytes by HVD_LB_DATA_CACHE; None: half of what the disk has free."""
    text = os.environ.get(LIMIT, "")
    if not text:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{LIMIT} is {text!r}: expected a size such as 200GB, or 0 for no cache")
    return float(match[1]) * _UNITS[match[2]]


_told: set[str] = set()


def _tell_once(message: str) -> None:
    """In the log of the process."""
    if message not in _told:
        _told.add(message)
        print(f"hvd-lb: warning: {message}", file=sys.stderr, flush=True)
