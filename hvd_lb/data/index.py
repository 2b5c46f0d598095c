"""The index of image headers: path, label, width and height of every image of a folder, cached.

Crop windows are computed from sizes before an image is decoded, so sizes are read once and kept as .npy files
that every process maps. The cache is keyed by the folder and by each file's name, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvd_lb.data.cache import cache_folder
from hvd_lb.data.decode import BadImage, read_size
from hvd_lb.data.images import OnBadImage, Progress
from hvd_lb.data.listing import Listing, list_images
from hvd_lb.errors import UserError

_FORMAT = 2
_CHUNK = 256
_ARRAYS = {"labels": np.int64, "widths": np.int32, "heights": np.int32, "ends": np.int64, "names": np.uint8}


@dataclass(frozen=True)
class Index:
    """`names` are the relative paths in one piece, the i-th ends at `ends[i]`; other arrays are (N,).

    `broken` images have a header that cannot be read: width and height 0.
    """

    root: Path
    classes: list[str]
    labels: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    ends: np.ndarray
    names: np.ndarray
    broken: int = 0

    def path(self, position: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.relative(position)))

    def relative(self, position: int) -> bytes:
        start = self.ends[position - 1] if position else 0
        return self.names[start : self.ends[position]].tobytes()


def open_index(root: Path, on_progress: Progress | None = None, on_bad_image: OnBadImage = "fail") -> Index:
    """The index of `root`, from the cache if nothing has changed. UserError: the first image without a size.

    With "skip" such an image is kept, of width and height 0.
    """
    listing = list_images(root)
    # Everything cached under a name that says what is in it is never changed, only replaced as a whole.
    home = cache_folder() / "index" / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    folder = home / f"{listing.stamp}-{_FORMAT}"
    index = _load(folder, listing)
    if index is None:
        index = _build(listing, on_progress)
        try:
            _save(index, folder)
        except OSError:
            pass  # no room or no right to write: works as well, only not as fast the next time
        else:
            for old in home.iterdir():
                if old != folder and not old.name.startswith("tmp"):
                    shutil.rmtree(old, ignore_errors=True)
            index = _load(folder, listing) or index
    if index.broken and on_bad_image == "fail":
        raise _first_broken(index)
    return index


def _build(listing: Listing, on_progress: Progress | None) -> Index:
    total = len(listing.names)
    sizes = np.zeros((total, 2), np.int32)

    def measure(start: int) -> None:
        for position in range(start, min(start + _CHUNK, total)):
            with suppress(BadImage):
                sizes[position] = read_size(os.path.join(listing.root, os.fsdecode(listing.names[position])))

    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1)), "hvd-lb index") as pool:
        starts = range(0, total, _CHUNK)
        for start, _ in zip(starts, pool.map(measure, starts), strict=True):
            if on_progress is not None:
                on_progress(f"reading image sizes in {listing.root.name}", min(start + _CHUNK, total), total)
    return Index(
        listing.root,
        listing.classes,
        listing.labels,
        sizes[:, 0],
        sizes[:, 1],
        np.cumsum([len(name) for name in listing.names], dtype=np.int64),
        np.frombuffer(b"".join(listing.names), np.uint8),
        int((sizes[:, 0] == 0).sum()),
    )


def _first_broken(index: Index) -> UserError:
    path = index.path(int(np.argmin(index.widths)))
    more = f" ({index.broken} such files in {index.root})" if index.broken > 1 else ""
    try:
        read_size(path)
    except UserError as error:
        return UserError(f"{error}, or --on-bad-image skip{more}")
    return UserError(f"{path}: changed while its header was read; leave files in use alone")


def _save(index: Index, folder: Path) -> None:
    """Written elsewhere and renamed: what `folder` holds is complete. Whoever is second loses nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="tmp", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        made = Path(temporary) / "index"
        made.mkdir()
        for name, dtype in _ARRAYS.items():
            np.save(
                made / f"{name}.npy", np.ascontiguousarray(getattr(index, name), dtype), allow_pickle=False
            )
        about = {"root": str(index.root), "classes": index.classes, "broken": index.broken}
        (made / "index.json").write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def _load(folder: Path, listing: Listing) -> Index | None:
    """None for what is not there, or is not what `_save` wrote."""
    try:
        about = json.loads((folder / "index.json").read_text())
        classes, broken = about["classes"], int(about["broken"])
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS
        }
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    count = len(listing.names)
    whole = all(
        array.dtype == _ARRAYS[name] and (name == "names" or array.shape == (count,))
        for name, array in arrays.items()
    )
    return (
        Index(listing.root, classes, **arrays, broken=broken)
        if whole and classes == listing.classes
        else None
    )
