"""The user's cache folder: what can be made again, kept to be fast the second time."""

from __future__ import annotations

import os
from pathlib import Path

from hvd_lb.errors import UserError


def cache_folder() -> Path:
    """$HVD_LB_CACHE, else hvd-lb in $XDG_CACHE_HOME or ~/.cache; not made here. UserError where it can be none."""
    if own := os.environ.get("HVD_LB_CACHE"):
        named = Path(own).expanduser()
        there = next(path for path in (named, *named.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"HVD_LB_CACHE is {own}, and {there} is no folder: expected the path of one")
        return named
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if folder.startswith("~"):
        raise UserError("there is no home directory for the cache: set HOME, or HVD_LB_CACHE to a folder")
    return Path(folder) / "hvd-lb"
