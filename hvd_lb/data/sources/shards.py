"""WebDataset shards: plain tar files of images and labels, listed and scanned once (docs/data.md, shards)."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from hvd_lb.data.files.journal import Journal
from hvd_lb.data.files.rows import Table
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.images import Progress
from hvd_lb.data.options import UNFINISHED
from hvd_lb.data.remote.address import Address, Place, is_address
from hvd_lb.data.remote.objects import ObjectReader
from hvd_lb.data.remote.store import ObjectState
from hvd_lb.data.sources.labels import CLASSES_FILES, Classes, UnknownLabel, classes_in, find_classes
from hvd_lb.data.sources.places import MANIFEST, manifest, names_in
from hvd_lb.data.sources.source import FileState, Listing, file_state, stamped
from hvd_lb.data.sources.splits import Split, renamed, split_of
from hvd_lb.data.sources.tar_scan import Scan, scan_object, scan_shard
from hvd_lb.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.lz4")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = "*?["
_MOST_SHARDS = 1_000_000
_NUMBERED = re.compile(
    r"(?P<prefix>(?:.*[-_.])?(?P<split>train|training|val|valid|validation)[-_.]?)(?P<number>\d+)\.tar",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class ShardSource:
    """Shards by their names in `root`, in order; `classes` are those of the training split where this is the other."""

    root: Place
    name: str
    shards: tuple[str, ...]
    classes: Classes | None = None
    cheap: int = 0  # all files are watched; of a server all but that of classes

    @property
    def home(self) -> Place:
        return self.root

    def with_classes(self, classes: list[str]) -> ShardSource:
        return replace(self, classes=Classes(classes, from_file=False))

    def fits(self, classes: list[str], shards: list[str]) -> bool:
        return shards == list(self.shards) and (self.classes is None or self.classes.names == classes)

    def listing(self) -> Listing:
        try:
            watched = list(in_threads(partial(file_state, self.root), self.shards))
            times = self._times(watched)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
        _check_sizes(self.root, {name: size for name, _, size in watched})
        classes = classes_in(self.root, self.classes)
        given = [*classes.names, str(classes.from_file), *(classes.order or ())] if classes else []
        known = (f"{name}\0{size}\0{time}" for (name, _, size), time in zip(watched, times, strict=True))
        objects = [(tag, size) for _, tag, size in watched] if isinstance(self.root, Address) else []
        stamp = stamped([*given, "", *known])
        if isinstance(self.root, Path):
            watched += [file_state(self.root, name) for name in CLASSES_FILES]
        return Listing(stamp, watched, partial(self._build, classes, objects))

    def _times(self, watched: list[FileState]) -> list[int]:
        """When each was changed, settled or not."""
        if isinstance(self.root, Address):
            return [tag for _, tag, _ in watched]
        root = self.root
        return list(in_threads(lambda name: os.stat(root / name).st_mtime_ns, self.shards))

    def _scan(self, objects: list[tuple[int, int]]) -> Callable[[int], Scan]:
        """Of a shard by its position."""
        root, shards = self.root, self.shards
        if isinstance(root, Path):
            return lambda shard: scan_shard(root / shards[shard])
        reader = ObjectReader(root, shards, [ObjectState(size, tag) for tag, size in objects])
        return lambda shard: scan_object(root / shards[shard], objects[shard][1], reader.window(shard))

    def _build(
        self, classes: Classes | None, objects: list[tuple[int, int]], report: Progress, journal: Journal
    ) -> Table:
        scans: list[Scan] = []
        for number, block in journal.blocks():
            if number == len(scans):
                scans.append(Scan.from_bytes(block))
        for scan in in_threads(self._scan(objects), range(len(scans), len(self.shards))):
            journal.append(len(scans), scan.to_bytes())
            scans.append(scan)
            report(f"reading shards in {self.root.name}", len(scans), len(self.shards))
        labels = {label: None for scan in scans for label in scan.labels}
        try:
            classes = classes or find_classes(labels)
            for scan in scans:
                scan.rows["label"] = classes.numbers(scan.labels)[scan.rows["label"]]
        except UnknownLabel as error:
            raise _blame(self.root, self.shards, scans, error) from error
        return replace(_joined(classes.names, list(self.shards), scans), objects=objects)


def _joined(classes: list[str], shards: list[str], scans: Sequence[Scan]) -> Table:
    broken, rows_before, bytes_before = None, 0, 0
    for shard, scan in enumerate(scans):
        scan.rows["shard"] = shard
        scan.rows["name_at"] += bytes_before
        if broken is None and scan.first_broken is not None:
            broken = (rows_before + scan.first_broken[0], scan.first_broken[1])
        rows_before += len(scan.rows)
        bytes_before += len(scan.names)
    names = np.frombuffer(b"".join(scan.names for scan in scans), np.uint8)
    return Table(classes, np.concatenate([scan.rows for scan in scans]), names, shards, broken)


def _blame(root: Place, shards: Sequence[str], scans: Sequence[Scan], error: UnknownLabel) -> UserError:
    """Names the first image with that label, where labels are still those of the scan."""
    for shard, scan in zip(shards, scans, strict=True):
        if error.label in scan.labels:
            row = scan.rows[int(np.argmax(scan.rows["label"] == scan.labels.index(error.label)))]
            name = scan.names[row["name_at"] : row["name_at"] + row["name_bytes"]]
            return UserError(f"{root / shard}: {os.fsdecode(name)}: {error}")
    return UserError(f"{root}: {error}")


def is_pattern(spec: str) -> bool:
    """Whether it names shards: a tar file, a range or a glob of them."""
    return spec.endswith(".tar")


def named_shards(spec: str) -> ShardSource:
    """Of `DIR/train-{0000..0146}.tar`, `DIR/train-{a,b}.tar`, `DIR/train-*.tar`, `DIR/train-[0-9].tar` or one tar file.

    UserError for those that are not there.
    """
    root, pattern = divided(spec)
    names = _expanded(pattern)
    if any(mark in pattern for mark in _GLOB) and not (isinstance(root, Path) and (root / pattern).exists()):
        there = names_in(root) if isinstance(root, Address) or root.is_dir() else []
        present = [name for name in there if not name.startswith(".")]
        names = [name for pattern in names for name in fnmatch.filter(present, pattern)]
    names = sorted(dict.fromkeys(names), key=by_number)
    # A server is asked for each of them soon, and says which one is not there.
    missing = [name for name in names if isinstance(root, Path) and not (root / name).exists()]
    if missing or not names:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{root / (missing[0] if missing else pattern)}: no such file{more}; copy it, or leave it out of --data"
        )
    return ShardSource(root, pattern.replace("/", "|"), tuple(names))


def sibling(source: ShardSource) -> ShardSource | None:
    """The validation shards beside training shards: `val` or the like in place of the last `train` of the name.

    Not those of tests, which often have no labels.
    """
    for word in ("val", "valid", "validation"):
        wanted = renamed(source.name, word)
        if wanted is None:
            return None
        pieces = re.split(r"(?:\{[^{}]*\}|\[[^\]]*\]|[*?])+", wanted)
        of = re.compile(r"\d+".join(map(re.escape, pieces)), re.IGNORECASE)
        names = sorted(filter(of.fullmatch, names_in(source.root)), key=by_number)
        if names:
            return ShardSource(source.root, wanted, tuple(names))
    return None


def shards_in(folder: Place) -> dict[Split, ShardSource]:
    """By split the numbered shards of a folder. UserError where one is missing, or compressed."""
    names = set(names_in(folder))
    if UNFINISHED in names:
        raise UserError(f"{folder}: is not finished; give the command that makes it again")
    missing = sorted(set(manifest(folder)) - names)
    found: dict[Split, list[str]] = {}
    numbers: dict[str, list[tuple[int, str]]] = {}
    for name in sorted(names, key=by_number):
        if (match := _NUMBERED.fullmatch(name)) and (split := split_of(match["split"])):
            found.setdefault(split, []).append(name)
            numbers.setdefault(match["prefix"], []).append((int(match["number"]), name))
    for prefix, present in numbers.items():
        for (number, name), (following, _) in itertools.pairwise(sorted(present)):
            if following > number + 1:
                width = len(name) - len(prefix) - len(".tar")
                missing.append(f"{prefix}{number + 1:0{width}}.tar")
    if packed := sorted(name for name in names if _unpacked(name) and _unpacked(name) not in names):
        raise refused_compressed(folder / packed[0])
    for first, *others in found.values():
        if other := next((name for name in others if _prefix(name) != _prefix(first)), None):
            raise UserError(
                f"{folder}: has both {first} and {other}, which may be of two data sets; name those that are meant "
                f"with --data and --val, such as '{folder}/{_prefix(first)}*.tar'"
            )
    if missing:
        raise UserError(
            f"{folder}: has no {missing[0]}; copy it, or name the shards to use, such as "
            f"--data '{folder}/train-{{0000..0146}}.tar' or '{folder}/train-*.tar'"
        )
    return {split: ShardSource(folder, f"{split}-shards", tuple(names)) for split, names in found.items()}


def _prefix(name: str) -> str:
    """What stands before the number of a shard."""
    match = _NUMBERED.fullmatch(name)
    return match["prefix"] if match else name


def tar_files(folder: Path) -> list[str]:
    """However they are called."""
    return sorted(name for name in os.listdir(folder) if is_pattern(name) and not name.startswith("."))


def by_number(name: str) -> tuple[list[str | int], str]:
    """The order of shards: numbers in their names count as numbers, so 9 comes before 10, written 09 or 9."""
    parts = _DIGITS.split(name)
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name


def _unpacked(name: str) -> str:
    """What a compressed shard would be called without compression; nothing for other names."""
    ending = next((ending for ending in COMPRESSED if name.endswith(ending)), None)
    plain = f"{name.removesuffix(ending)}.tar" if ending else ""
    return plain if _NUMBERED.fullmatch(plain) else ""


def refused_compressed(path: Place | str) -> UserError:
    return UserError(f"{path}: compressed shards have no offsets to read at; decompress them to .tar")


def divided(spec: str) -> tuple[Place, str]:
    """The last folder without a range or glob in its path, and the rest."""
    address = Address.of(spec) if is_address(spec) else None
    parts = tuple(address.path.split("/")) if address else Path(spec).expanduser().parts
    count = next((i for i, part in enumerate(parts) if set("{*?") & set(part)), len(parts) - 1)
    root = Address(address.server, "/".join(parts[:count])) if address else Path(*parts[:count])
    return root, "/".join(parts[count:])


def _expanded(pattern: str) -> list[str]:
    """With one of the choices in each pair of braces, in all ways, as bash has it."""
    texts = _BRACES.split(pattern)
    choices = [_choices(inside) for inside in texts[1::2]]
    return [
        "".join(itertools.chain(*zip(texts[::2], (*chosen, ""), strict=True)))
        for chosen in itertools.product(*choices)
    ]


def _choices(inside: str) -> list[str]:
    """Of `0..12` and `a,b`."""
    if not (numbers := _RANGE.fullmatch(inside)):
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = numbers.groups()
    if int(last) < int(first) or int(last) - int(first) >= _MOST_SHARDS:
        raise UserError(f"{{{inside}}}: expected an increasing range of at most {_MOST_SHARDS} shards")
    padded = any(number.startswith("0") and number != "0" for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]


def _check_sizes(root: Place, sizes: dict[str, int]) -> None:
    known = manifest(root)
    for name, size in sizes.items():
        if known.get(name, size) != size:
            raise UserError(
                f"{root / name}: has {size} bytes, but {known[name]} in {MANIFEST}; copy it again"
            )
