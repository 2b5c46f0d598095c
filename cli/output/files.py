"""What a command is told to write: looked at before anything is computed; that it cannot be written is bad input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvd_lb.errors import UserError


def new_file(path: Path) -> Path:
    """Its absolute path. UserError where it is plain that no file can be written there."""
    found = path.expanduser().absolute()
    if found.is_dir() or not found.parent.is_dir() or not os.access(found.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written: expected the name of a file in a folder that is there and may be written into"
        )
    return found


def new_folder(path: Path) -> Path:
    """Its absolute path. UserError where it is plain that no folder can be made, or filled, there."""
    found = path.expanduser().absolute()
    there = next(place for place in (found, *found.parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written: {there} is no folder that may be written into; choose another --output"
        )
    return found


@contextmanager
def status_1_is_a_verdict() -> Iterator[None]:
    """For a command whose exit code 1 is what it has found: an error of a file system is none of that."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename} cannot be read or written: " if error.filename else ""
        raise UserError(f"{what}{error.strerror or error}") from None
