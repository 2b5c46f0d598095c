"""The user's cache folder: what can be made again, kept to be fast the second time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$HVD_LB_CACHE, else hvd-lb in $XDG_CACHE_HOME or ~/.cache; not made here."""
    if own := os.environ.get("HVD_LB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hvd-lb"
