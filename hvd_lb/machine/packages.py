"""Installed packages."""

from __future__ import annotations

from importlib import metadata

NEWEST_TRIED = {"torch": (2, 15), "torchvision": (0, 29)}
"""With these and older ones, as far as setup.cfg allows, the tests have run."""

#: Those that compute, pixels or numbers: another version may round otherwise.
COMPUTING = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "pillow")


def version(package: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def untried() -> list[str]:
    """The libraries, with their versions, that are newer than any that hvd-lb was tried with."""
    installed = {name: version(name) for name in NEWEST_TRIED}
    return [
        f"{name} {found}"
        for name, found in installed.items()
        if found and tuple(int(part) for part in found.split(".")[:2]) > NEWEST_TRIED[name]
    ]
