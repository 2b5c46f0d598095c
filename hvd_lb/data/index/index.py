"""The index of a split: location, size, label, width, height and orientation of every image, mapped by every process.

Crop windows are computed from sizes before an image is decoded, so headers are read once and kept. Opening an index
reads no row: what a run needs to know of all of them is in its facts.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from hvd_lb.data.decoding.decode import BadImage
from hvd_lb.data.files.journal import Journal
from hvd_lb.data.files.rows import Table
from hvd_lb.data.images import Progress
from hvd_lb.data.index import store
from hvd_lb.data.index.store import Facts
from hvd_lb.data.options import OnBadImage
from hvd_lb.data.remote.address import Place
from hvd_lb.data.sources.source import Listing, Source
from hvd_lb.errors import UserError

Check = Literal["none", "quick", "full"]
"""Whether an index that is there is compared with nothing, with what its source watches, or with one made anew."""


@dataclass(frozen=True)
class Index:
    """`rows` are (N,) of `hvd_lb.data.files.rows.ROW`, `names` all names in one piece (uint8).

    `keep` are folders in which what follows from the index may be kept, the first choice first; `identity` names its
    contents.
    """

    root: Place
    facts: Facts
    rows: np.ndarray
    names: np.ndarray
    identity: str = ""
    keep: tuple[Path, ...] = field(default=())

    @property
    def classes(self) -> list[str]:
        return self.facts.classes

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), a view."""
        return self.rows["label"]

    @property
    def widths(self) -> np.ndarray:
        """int32 (N,), a view."""
        return self.rows["width"]

    @property
    def heights(self) -> np.ndarray:
        """int32 (N,), a view."""
        return self.rows["height"]

    def forget(self) -> None:
        """Let what was touched leave this process's memory, where it is mapped; it stays usable."""
        for array in (self.rows, self.names):
            mapping = getattr(array, "_mmap", None)
            if mapping is not None:
                mapping.madvise(mmap.MADV_DONTNEED)

    def relative(self, position: int) -> bytes:
        """The image's path relative to the root, or its name in the shard."""
        row = self.rows[position]
        start = int(row["name_at"])
        return self.names[start : start + int(row["name_bytes"])].tobytes()

    def names_of(self, start: int, stop: int) -> tuple[bytes, np.ndarray]:
        """The names of rows `start` … `stop` − 1, one behind the other, and the bytes that each has."""
        rows = self.rows[start:stop]
        lengths = rows["name_bytes"].astype(np.int64)
        ends = np.cumsum(lengths)
        shift = rows["name_at"] - (ends - lengths)
        if (shift == shift[:1]).all():  # so they lie
            begin = int(shift[0]) if len(shift) else 0
            return self.names[begin : begin + int(lengths.sum())].tobytes(), lengths
        return self.names[np.repeat(shift, lengths) + np.arange(int(lengths.sum()))].tobytes(), lengths

    def path(self, position: int) -> str:
        """For messages, and to open it where it is a file of its own."""
        shard = int(self.rows[position]["shard"])
        name = os.fsdecode(self.relative(position))
        if shard < 0:
            return os.path.join(str(self.root), name)
        return f"{self.root / self.facts.shards[shard]}: {name}"


def open_index(
    source: Source,
    on_progress: Progress | None = None,
    on_bad_image: OnBadImage = "fail",
    *,
    check: Check = "quick",
    write_beside: bool = False,
) -> Index:
    """The index of `source`: the one that is there, or, if there is none or anything has changed, a new one.

    UserError: the first image without a size; with "skip" it is kept, of width and height 0. `write_beside` uses only
    an index beside the data.
    """
    homes = store.homes(source, write_beside)
    index, listing = _present(source, homes, check)
    if index is None:
        index = _make(source, homes, listing, on_progress or _no_progress)
    if on_bad_image == "fail":
        _refuse_broken(index)
    return index


def _present(source: Source, homes: list[Path], check: Check) -> tuple[Index | None, Listing | None]:
    """The newest index that the check lets pass, if one can; a listing if one was needed."""
    listing: Listing | None = None
    if check == "full":
        return None, None
    for folder in (folder for home in homes for folder in store.newest(home)):
        index = _load(folder, source)
        if index is None:
            continue
        if check == "none":
            return index, None
        # Whoever repairs a broken file changes no place.
        each = index.facts.images <= source.cheap or index.facts.broken
        if not each and store.unchanged(folder, source.root):
            return index, None
        listing = listing or source.listing()
        # Files of one length and time may have changed places: to look at all of them anew is as cheap as the listing.
        moved = each and store.changed(folder, source.root)
        if folder.name == store.folder_name(listing.stamp) and not moved:
            return _confirmed(folder, index, listing), listing
    return None, listing


def _confirmed(folder: Path, index: Index, listing: Listing) -> Index:
    """An index that was found to be up to date, with what there is to say now of where the images lie."""
    if listing.remarks is not None and listing.remarks != index.facts.remarks:
        index = replace(index, facts=replace(index.facts, remarks=listing.remarks))
        with suppress(OSError):
            store.write_facts(folder, index.facts)
    with suppress(OSError):  # so that the next look at what is watched is enough
        store.write_watched(folder, listing.watched)
    store.renew(folder)
    return index


def _make(source: Source, homes: list[Path], listing: Listing | None, report: Progress) -> Index:
    """In the first home that can be written."""
    for home in homes:
        with ExitStack() as held:
            try:
                waited = held.enter_context(store.locked(home))
            except OSError:
                continue
            if waited:  # for another process, which may have made it
                index, listing = _present(source, homes, "quick")
                if index is not None:
                    return index
            return _make_in(home, source, listing or source.listing(), report)
    table = (listing or source.listing()).build(report, Journal())
    return _unsaved(source, table)


def _make_in(home: Path, source: Source, listing: Listing, report: Progress) -> Index:
    folder = home / store.folder_name(listing.stamp)
    present = _load(folder, source)
    # Where there is one, all is looked at anew: what an interrupted process has left may be as old.
    with Journal(None if present else store.journal(folder)) as journal:
        table = listing.build(report, journal)
    facts = store.facts_of(table)
    if present:
        same = _equal(present.rows, table.rows) and _equal(present.names, table.names)
        if same and present.classes == table.classes:
            return _confirmed(folder, present, listing)  # others may be reading it
        with suppress(OSError):
            store.set_aside(folder)

    def fill(made: Path) -> None:
        store.save_rows(made, table.rows, facts)
        np.save(made / "names.npy", table.names, allow_pickle=False)
        store.write_watched(made, listing.watched)

    try:
        store.save(folder, fill, lambda there: _load(there, source))
    except OSError:
        return _unsaved(source, table)
    store.discard_others(folder)
    return _load(folder, source) or _unsaved(source, table)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) == len(other) and bool((one == other).all())


def _unsaved(source: Source, table: Table) -> Index:
    """It works as well, only not as fast the next time."""
    return Index(source.root, store.facts_of(table), table.rows, table.names)


def _load(folder: Path, source: Source) -> Index | None:
    store.use(folder)  # before it is mapped
    found, names = store.load_rows(folder), store.load_names(folder)
    if found is None or names is None:
        return None
    rows, facts = found
    if not source.fits(facts.classes, facts.shards):
        return None
    if len(rows) and int(rows[-1]["name_at"]) + int(rows[-1]["name_bytes"]) > len(names):
        return None
    spare = store.cached(source) / folder.name
    identity = f"{folder.name}-{facts.sum:08x}"
    return Index(source.root, facts, rows, names, identity, tuple(dict.fromkeys([folder, spare])))


def _no_progress(label: str, done: int, total: int) -> None:
    pass


def _refuse_broken(index: Index) -> None:
    facts = index.facts
    if facts.first_broken is not None:
        position, reason = facts.first_broken
        more = f" ({facts.broken} such files in {index.root})" if facts.broken > 1 else ""
        raise UserError(f"{BadImage(index.path(position), reason)}, or --on-bad-image skip{more}")
