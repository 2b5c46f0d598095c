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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvd_lb.data.cache import cache_folder
from hvd_lb.data.decode import read_size
from hvd_lb.data.images import Progress
from hvd_lb.data.listing import Listing, list_images
from hvd_lb.errors import UserError

_FORMAT = 1
_CHUNK = 256
_ARRAYS = {"labels": np.int64, "widths": np.int32, "heights": np.int32, "ends": np.int64, "names": np.uint8}


@dataclass(frozen=True)
class Index:
    """`names` are the relative paths in one piece, the i-th ends at `ends[i]`; other arrays are (N,)."""

    root: Path
    classes: list[str]
    labels: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    ends: np.ndarray
    names: np.ndarray

    def path(self, position: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.relative(position)))

    def relative(self, position: int) -> bytes:
        start = self.ends[position - 1] if position else 0
        return self.names[start : self.ends[position]].tobytes()


def open_index(root: Path, on_progress: Progress | None = None) -> Index:
    """The index of `root`, from the cache if nothing has changed. UserError: the first unreadable image."""
    listing = list_images(root)
    # Everything cached under a name that says what is in it is never changed, only replaced as a whole.
    home = cache_folder() / "index" / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    folder = home / f"{listing.stamp}-{_FORMAT}"
    cached = _load(folder, listing)
    if cached is not None:
        return cached
    index = _build(listing, on_progress)
    try:
        _save(index, folder)
    except OSError:
        return index  # no room or no right to write: works as well, only not as fast the next time
    for old in home.iterdir():
        if old != folder and not old.name.startswith("tmp"):
            shutil.rmtree(old, ignore_errors=True)
    return _load(folder, listing) or index


def _build(listing: Listing, on_progress: Progress | None) -> Index:
    total = len(listing.names)
    sizes = np.empty((total, 2), np.int32)
    failures: list[tuple[int, str]] = []

    def measure(start: int) -> list[tuple[int, str]]:
        failed = []
        for position in range(start, min(start + _CHUNK, total)):
            try:
                sizes[position] = read_size(os.path.join(listing.root, os.fsdecode(listing.names[position])))
            except UserError as error:
                failed.append((position, str(error)))
        return failed

    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1)), "hvd-lb index") as pool:
        starts = range(0, total, _CHUNK)
        for start, failed in zip(starts, pool.map(measure, starts), strict=True):
            failures += failed
            if on_progress is not None:
                on_progress(f"reading image sizes in {listing.root.name}", min(start + _CHUNK, total), total)
    if failures:
        more = f" ({len(failures)} such files in {listing.root})" if len(failures) > 1 else ""
        raise UserError(f"{failures[0][1]}; mend or remove it{more}")
    return Index(
        listing.root,
        listing.classes,
        listing.labels,
        sizes[:, 0],
        sizes[:, 1],
        np.cumsum([len(name) for name in listing.names], dtype=np.int64),
        np.frombuffer(b"".join(listing.names), np.uint8),
    )


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
        (made / "index.json").write_text(json.dumps({"root": str(index.root), "classes": index.classes}))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def _load(folder: Path, listing: Listing) -> Index | None:
    """None for what is not there, or is not what `_save` wrote."""
    try:
        classes = json.loads((folder / "index.json").read_text())["classes"]
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
    return Index(listing.root, classes, **arrays) if whole and classes == listing.classes else None
