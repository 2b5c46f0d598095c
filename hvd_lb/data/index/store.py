"""Where indexes lie: beside the data or in the cache folder, as files that every process maps and none changes.

    HOME/STAMP-FORMAT/rows.npy names.npy facts.json places.json

HOME is `.hvd-lb-index/NAME` beside the data, found by all who share that file system, or a folder in the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hvd_lb.data.files.header import KINDS
from hvd_lb.data.files.journal import sync
from hvd_lb.data.files.rows import ROW, Table
from hvd_lb.data.files.threads import in_threads
from hvd_lb.data.remote.address import Place
from hvd_lb.data.sources.source import FileState, Source, file_state
from hvd_lb.errors import UserError
from hvd_lb.machine.cache_folder import cache_folder

BESIDE = ".hvd-lb-index"
_FORMAT = 4
_FOLDER = re.compile(rf"[0-9a-f]{{32}}-{_FORMAT}")
_ANY_FORMAT = re.compile(r"[0-9a-f]{32}-\d+")

_JOURNAL = ".journal"
_USERS, _OUTDATED = "users", "outdated"
_OUTDATED_SECONDS = 30 * 86_400.0
_UNFINISHED_SECONDS = 86_400.0


@dataclass(frozen=True)
class Facts:
    """What would else take a pass over all rows. Lists are in the order of the classes."""

    images: int
    classes: list[str]
    counts: list[int]
    kinds: dict[str, int]
    bytes: int
    #: The position of the image with most pixels; 0 without images.
    largest: int
    #: Images whose header cannot be read, and the position of the first and what is wrong with it.
    broken: int
    first_broken: tuple[int, str] | None
    shards: list[str]
    remarks: list[str]
    #: Checksum of rows and names: an index that was made anew may have the same stamp.
    sum: int
    #: Of shards at a server tag and bytes, in their order; empty for files.
    objects: list[tuple[int, int]] = field(default_factory=list)


def cached(source: Source) -> Path:
    home = source.home.resolve() if isinstance(source.home, Path) else source.home
    key = os.fsencode(str(home)) + b"\0" + os.fsencode(source.name)
    return cache_folder() / "index" / hashlib.sha256(key).hexdigest()[:16]


def homes(source: Source, write_beside: bool = False) -> list[Path]:
    """Where an index may be, the first choice first; only beside the data, whose home is made, if it is to be there."""
    if not isinstance(source.home, Path):
        if write_beside:
            raise UserError(f"{source.home}: nothing is written to servers; leave --beside out")
        return [cached(source)]
    own = source.home / BESIDE / source.name
    if write_beside:
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{own}: cannot be written ({error.strerror}); leave --beside out") from error
        return [own]
    return [own, cached(source)] if own.is_dir() else [cached(source)]


def folder_name(stamp: str) -> str:
    return f"{stamp}-{_FORMAT}"


def journal(folder: Path) -> Path:
    """Where is kept what an index in the making knows so far."""
    return folder.with_name(folder.name + _JOURNAL)


def newest(home: Path) -> Iterator[Path]:
    """Folders with indexes of the present format in `home`, the newest first."""
    with suppress(OSError):
        found = [entry for entry in os.scandir(home) if _FOLDER.fullmatch(entry.name)]
        for entry in sorted(found, key=_made, reverse=True):
            yield Path(entry.path)


def _made(entry: os.DirEntry[str]) -> int:
    """When the index in a folder was made: others write into that later."""
    try:
        return os.stat(os.path.join(entry.path, "facts.json")).st_mtime_ns
    except OSError:
        return 0


def unchanged(folder: Path, root: Place) -> bool:
    """Whether what is watched of an index is as it was when it was made."""
    try:
        known = [tuple(of) for of in json.loads((folder / "places.json").read_text("ascii"))]
        return all(in_threads(lambda of: of[1] != 0 and file_state(root, of[0]) == of, known))
    except (OSError, ValueError, TypeError, LookupError):
        return False


def changed(folder: Path, root: Place) -> bool:
    """Whether something that was known to be at rest is no longer as it was."""
    try:
        known = [tuple(of) for of in json.loads((folder / "places.json").read_text("ascii"))]
        return any(in_threads(lambda of: of[1] != 0 and file_state(root, of[0]) != of, known))
    except (OSError, ValueError, TypeError, LookupError):
        return True


def write_watched(folder: Path, watched: list[FileState]) -> None:
    """OSError where that is not allowed."""
    _replace(folder / "places.json", watched)


def write_facts(folder: Path, facts: Facts) -> None:
    """OSError where that is not allowed."""
    _replace(folder / "facts.json", asdict(facts))


def _replace(path: Path, content: object) -> None:
    # Not by tempfile, whose files other users, who may share the index, cannot read.
    made = path.with_name(f"{path.stem}-{secrets.token_hex(8)}.json")
    made.write_text(json.dumps(content), "ascii")
    os.replace(made, path)


def facts_of(table: Table) -> Facts:
    rows = table.rows
    pixels = rows["width"].astype(np.int64) * rows["height"]
    kinds = np.bincount(rows["kind"], minlength=len(KINDS)).tolist()
    return Facts(
        images=len(rows),
        classes=table.classes,
        counts=np.bincount(rows["label"], minlength=len(table.classes)).tolist(),
        kinds={name: count for name, count in zip(KINDS, kinds, strict=True) if count},
        bytes=int(rows["size"].sum()),
        largest=int(pixels.argmax()) if len(rows) else 0,
        broken=kinds[0],
        first_broken=table.first_broken,
        shards=table.shards,
        remarks=table.remarks,
        sum=zlib.crc32(_bytes(table.names), zlib.crc32(_bytes(rows))),
        objects=table.objects,
    )


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).data


def set_aside(folder: Path) -> None:
    """Keep an outdated index whose name is wanted, as it may be mapped, until nobody can be using it. OSError."""
    folder.rename(folder.with_name(folder_name(secrets.token_hex(16))))


def save(folder: Path, fill: Callable[[Path], None], whole: Callable[[Path], object]) -> None:
    """Make `folder` at once: filled elsewhere and renamed, so that what is there is complete. OSError.

    One that is there already and `whole`, as another process was faster, is left alone: it may be mapped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="tmp", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        fill(made)
        for path in [*made.iterdir(), made]:  # before it has its name, as the power may go
            sync(path)
        if folder.exists() and not whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise


def save_rows(folder: Path, rows: np.ndarray, facts: Facts, prefix: str = "") -> None:
    np.save(folder / f"{prefix}rows.npy", rows, allow_pickle=False)
    (folder / f"{prefix}facts.json").write_text(json.dumps(asdict(facts)), "ascii")


def load_rows(folder: Path, prefix: str = "") -> tuple[np.ndarray, Facts] | None:
    """Mapped; None for what is not there, or is not what `save_rows` wrote."""
    try:
        values: dict[str, Any] = json.loads((folder / f"{prefix}facts.json").read_text("ascii"))
        values["first_broken"] = tuple(values["first_broken"]) if values["first_broken"] else None
        facts = Facts(**values)
        rows = np.load(folder / f"{prefix}rows.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return (rows, facts) if rows.dtype == ROW and rows.shape == (facts.images,) else None


def load_names(folder: Path) -> np.ndarray | None:
    """uint8, mapped; None as for `load_rows`."""
    try:
        names = np.load(folder / "names.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return names if names.dtype == np.uint8 and names.ndim == 1 else None


def use(folder: Path) -> None:
    """Leave a mark that this machine maps the index in `folder`, where that may be written."""
    with suppress(OSError):
        (folder / _USERS).mkdir(exist_ok=True)
        (folder / _USERS / _machine()).touch()


def discard_others(folder: Path) -> None:
    """Delete what nobody can be using beside the index `folder`: under the lock.

    That is what killed processes have left unfinished, and older indexes, but for those that processes on other
    machines may have mapped: on network file systems these would be killed by SIGBUS. (On this machine the kernel
    keeps what is mapped.) Where other users may read, and leave no mark, and of other versions, which leave none,
    nobody knows. Such an index is deleted a month after the first newer one was made.
    """
    for path in sorted(folder.parent.iterdir()):
        with suppress(OSError):
            if path.name.endswith(_JOURNAL):
                path.unlink()
            elif path != folder and path.is_dir() and _unused(path):
                shutil.rmtree(path, ignore_errors=True)


def _unused(folder: Path) -> bool:
    """Whether no process can be using an outdated index, or something unfinished. OSError."""
    if not _ANY_FORMAT.fullmatch(folder.name):
        return time.time() - folder.stat().st_mtime > _UNFINISHED_SECONDS
    private = folder.parent.parent.name != BESIDE and _FOLDER.fullmatch(folder.name)
    marks = {path.name for path in (folder / _USERS).glob("*")}
    if private and marks <= {_machine(), _OUTDATED}:
        return True
    mark = folder / _USERS / _OUTDATED
    if _OUTDATED not in marks:
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    return time.time() - mark.stat().st_mtime > _OUTDATED_SECONDS


def renew(folder: Path) -> None:
    """An outdated index is up to date again, since the data are as they were; it is the newest then."""
    with suppress(OSError):
        (folder / _USERS / _OUTDATED).unlink(missing_ok=True)
        os.utime(folder / "facts.json")


def _machine() -> str:
    """This machine since it was started: one kernel, whatever its containers are called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def locked(home: Path) -> Iterator[bool]:
    """One process of all that share `home` at a time, where the file system has locks; whether it had to wait.

    OSError where nothing can be written.
    """
    home.mkdir(parents=True, exist_ok=True)
    waited = False
    with (home / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # no locks here: whoever is second does the work again, and loses nothing
            pass
        yield waited
