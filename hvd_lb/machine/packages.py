"""Installed packages."""

from __future__ import annotations

from importlib import metadata


def version(package: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
