"""What lies in a folder, on a file system or at a server: the same questions to both."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hvd_lb.data.remote import store
from hvd_lb.data.remote.address import Address, Place
from hvd_lb.errors import UserError, each_once

MANIFEST = "manifest.json"


def names_in(folder: Place) -> list[str]:
    """Names of files and, on a file system, folders. Web servers list nothing: there the manifest does. OSError,
    UserError.
    """
    if isinstance(folder, Path):
        return os.listdir(folder)
    if folder.is_bucket:
        return store.names_in(folder)
    return [*manifest(folder), MANIFEST]


def manifest(folder: Place) -> dict[str, int]:
    """Bytes of each shard that the packer wrote; empty where it was not ours. UserError."""
    content = read_if_there(folder / MANIFEST)
    if content is None:
        return {}
    try:
        shards = json.loads(content, object_pairs_hook=each_once)["shards"]
        return {str(name): int(of["bytes"]) for name, of in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder / MANIFEST}: is not what `hvd-lb data pack` wrote; copy it again, or remove it"
        ) from error


def read_if_there(path: Place) -> bytes | None:
    """A small file; None where there is none. UserError.

    Web servers that list nothing often say that they deny what is not there.
    """
    if isinstance(path, Address):
        try:
            return store.content(path)
        except store.Missing:
            return None
        except store.Denied:
            if path.is_bucket:
                raise
            return None
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
