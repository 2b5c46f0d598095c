"""WebDataset shards as files: a tar whose bytes depend on nothing but the images, labels and names in it.

Time, owner and mode of a member are the same always and everywhere. Format: POSIX ustar (docs/data.md, shards).
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hvd_lb.data.prepare.encode import EncodedImage
from hvd_lb.errors import UserError

_END = 2 * tarfile.BLOCKSIZE
_LARGEST_MEMBER = 8**11 - 1  # eleven octal digits


@dataclass(frozen=True)
class Shard:
    """A finished shard: checksum and length of the file, its images, and how many of them would not decode."""

    sha256: str
    bytes: int
    images: int
    undecodable: int = 0

    def as_json(self) -> dict[str, Any]:
        """As in manifest.json; `undecodable` only where there are such."""
        values = asdict(self)
        return values if self.undecodable else {k: v for k, v in values.items() if k != "undecodable"}

    def matches(self, path: Path) -> bool:
        """Whether the file is there, has this length, and this checksum."""
        try:
            with path.open("rb") as file:
                return (
                    os.fstat(file.fileno()).st_size == self.bytes
                    and hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
                )
        except FileNotFoundError:
            return False


def sample_bytes(image: EncodedImage, label: int) -> int:
    """What a sample takes in a shard."""
    return sum(tarfile.BLOCKSIZE + _padded(size) for size in (len(image.content), len(str(label))))


class ShardWriter:
    """Writes samples to a new file at `path`; a context manager. What leaves it with an error is no whole tar."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = self._images = self._undecodable = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def images(self) -> int:
        return self._images

    def bytes_with(self, image: EncodedImage, label: int) -> int:
        """How long the file would be if it ended after this sample."""
        return self._bytes + sample_bytes(image, label) + _END

    def add(self, key: str, image: EncodedImage, label: int) -> None:
        self._member(key + image.ending, image.content)
        self._member(key + ".cls", str(label).encode())
        self._images += 1
        self._undecodable += image.undecodable

    def finish(self) -> Shard:
        """Ends the tar; when this returns it is on the disk."""
        self._write(bytes(_END))
        self._file.flush()
        os.fsync(self._file.fileno())
        return Shard(self._digest.hexdigest(), self._bytes, self._images, self._undecodable)

    def _member(self, name: str, content: bytes) -> None:
        if len(content) > _LARGEST_MEMBER:
            raise UserError(f"{name}: an image of {len(content):,} bytes is too large for a tar file")
        info = tarfile.TarInfo(name)  # its time, owner and group are 0, its mode is 644
        info.size = len(content)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        self._write(content)
        self._write(bytes(_padded(len(content)) - len(content)))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
