"""A validation split out of one source: which images are held out, kept beside the index they come from."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from hvd_lb.data.files.rows import Table
from hvd_lb.data.index import store
from hvd_lb.data.index.index import Index

_SPLITS = ("train", "val")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Divided:
    """The two parts of an index, each an index of its own."""

    train: Index
    val: Index


def divide(index: Index, fraction: float, seed: int) -> Divided:
    """The index without and with the images that `hold_out` chooses: computed once, then mapped."""
    # An index made anew can have the same folder in the cache, though not in its own.
    name = f"held-out-3-{fraction!r}-{seed}-{index.facts.sum:08x}"
    folders = [folder / name for folder in index.keep]
    for folder in folders:
        if found := _load(index, folder):
            return found
    held_out = hold_out(index, fraction, seed)
    parts = [_part(index, chosen) for chosen in (~held_out, held_out)]

    def fill(made: Path) -> None:
        for split, part in zip(_SPLITS, parts, strict=True):
            store.save_rows(made, part.rows, part.facts, f"{split}-")

    for folder in folders:
        with suppress(OSError):
            store.save(folder, fill, partial(_load, index))
            if found := _load(index, folder):
                return found
    return Divided(*parts)


def hold_out(index: Index, fraction: float, seed: int) -> np.ndarray:
    """bool (N,): which images validate. Those whose keyed hash of the relative path falls below `fraction`.

    So a file added to the folder moves no other. A class of two images or more always has one on either side; a file
    that a list names several times is one image.
    """
    hashes = _hashes(index, seed.to_bytes(8, "little", signed=True))
    held_out = hashes < np.uint64(fraction * 2.0**64)
    count = np.bincount(index.labels, minlength=len(index.classes))
    held = np.bincount(index.labels[held_out], minlength=len(index.classes))
    for label in np.flatnonzero((count > 0) & ((held == 0) | (held == count))):
        members = np.flatnonzero(index.labels == label)
        # In shards images can have the same name.
        of = np.arange(len(members)) if index.facts.shards else hashes[members]
        if len(np.unique(of)) < 2:
            held_out[members] = False
        elif held[label]:
            held_out[members[of == of[np.argmax(hashes[members])]]] = False
        else:
            held_out[members[of == of[np.argmin(hashes[members])]]] = True
    return held_out


def _hashes(index: Index, key: bytes) -> np.ndarray:
    """uint64 (N,): keyed hashes of the names, the same however the path of a file is written."""
    hashes = np.empty(len(index.rows), "<u8")
    for start in range(0, len(hashes), _CHUNK):
        names, lengths = index.names_of(start, start + _CHUNK)
        parts = itertools.pairwise([0, *np.cumsum(lengths).tolist()])
        each: Iterator[bytes] = (bytes(names[a:b]) for a, b in parts)
        if b"./" in names or b"//" in names:
            each = map(os.path.normpath, each)
        digests = (hashlib.blake2b(name, digest_size=8, key=key).digest() for name in each)
        hashes[start : start + len(lengths)] = np.frombuffer(b"".join(digests), "<u8")
    return hashes


def _part(index: Index, chosen: np.ndarray) -> Index:
    """The images of `chosen`, bool (N,)."""
    rows = index.rows[chosen]
    first = index.facts.first_broken
    broken = np.flatnonzero(rows["width"] == 0)
    first_broken = (int(broken[0]), first[1] if first else "") if len(broken) else None
    facts = index.facts
    table = Table(index.classes, rows, index.names, facts.shards, first_broken, facts.remarks, facts.objects)
    return replace(index, facts=store.facts_of(table), rows=rows, identity="", keep=())


def _load(index: Index, folder: Path) -> Divided | None:
    parts = []
    for split in _SPLITS:
        found = store.load_rows(folder, f"{split}-")
        if found is None:
            return None
        rows, facts = found
        identity = f"{index.identity}-{folder.name}-{split}"
        parts.append(replace(index, facts=facts, rows=rows, identity=identity, keep=(folder,)))
    return Divided(*parts)
