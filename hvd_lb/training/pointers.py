"""`last` and `best`: names that lead to a checkpoint, symbolic links, or small text files where there can be no links.

A copy that followed links (cp -L, object storage) has left folders under these names. They are taken for what they
are, a checkpoint, and are put right at the next change.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

NAMES = ("last", "best")
CHECKPOINT = re.compile(r"step-(\d{8})")

# What file systems without symbolic links say: SMB, exFAT, a mounted bucket.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_LONGEST = 64


def followed(path: Path) -> Path:
    """The checkpoint that a path leads to, be it a link, a text file with the name, or the folder itself."""
    path = path.absolute()
    with suppress(OSError, UnicodeDecodeError):
        if path.is_file() and path.stat().st_size <= _LONGEST:
            name = path.read_text("ascii").strip()
            if CHECKPOINT.fullmatch(name):
                return path.with_name(name)
        if path.is_symlink() and CHECKPOINT.fullmatch(name := os.readlink(path)):
            return path.with_name(name)  # the folders before it stay as they were named
    return path.resolve() if path.is_symlink() else path


def announce(folder: Path, name: str, target: str) -> None:
    """Note down that `name` leads to `target` as soon as that exists."""
    announced = folder / f".{name}"
    announced.unlink(missing_ok=True)
    try:
        announced.symlink_to(target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        announced.write_text(f"{target}\n", "ascii")


def settle(folder: Path) -> None:
    """Let names lead to what was announced, be it by a write that was killed before or after its rename."""
    for name in NAMES:
        announced, pointer = folder / f".{name}", folder / name
        if followed(announced).is_dir():
            _make_room(pointer)
            os.replace(announced, pointer)
        else:
            announced.unlink(missing_ok=True)


def drop_dangling(folder: Path) -> None:
    """Remove the names whose checkpoint is gone."""
    for name in NAMES:
        pointer = folder / name
        if not followed(pointer).is_dir():
            pointer.unlink(missing_ok=True)


def _make_room(pointer: Path) -> None:
    """A folder under the name of a pointer is a copy of a checkpoint: remove it."""
    if pointer.is_dir() and not pointer.is_symlink():
        removing = pointer.with_name(f".removing-{pointer.name}")
        shutil.rmtree(removing, ignore_errors=True)
        pointer.rename(removing)
        shutil.rmtree(removing, ignore_errors=True)
