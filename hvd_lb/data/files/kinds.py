"""Kinds of image files: those that are read, by their extension, and known ones that are not; names without meaning."""

from __future__ import annotations

import os

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm")
GIF = "GIF is not read: convert it to PNG"
HEIC = "HEIC is not read: convert it to JPEG, PNG or AVIF"
JPEG_2000 = "JPEG 2000 is not read: convert it to PNG or JPEG"
JPEG_XL = "JPEG XL is not read: convert it to PNG, or back to JPEG with djxl"
_OTHERS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), HEIC),
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), JPEG_2000),
    **dict.fromkeys(
        (".jpe", ".jfif"), "is not read under this name: JPEG files have to end in .jpg or .jpeg"
    ),
    ".gif": GIF,
    ".jxl": JPEG_XL,
    ".avifs": "AVIF sequences are not read: convert their frames to PNG",
    ".svg": "SVG is not read: draw it as PNG",
    ".psd": "PSD is not read: convert it to PNG",
}
NOT_READ = tuple(_OTHERS)
"""Endings of other image files."""

_OF_SYSTEMS = {
    "__macosx",
    "icon\r",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "@eadir",
    "#recycle",
    "#snapshot",
    "lost+found",
}


def why_not_read(name: str) -> str:
    """What to say of a file whose name does not end in one of EXTENSIONS."""
    return _OTHERS.get(os.path.splitext(name)[1].lower(), "no image file")


def is_ignored(name: str) -> bool:
    """Whether this is the name of a file or folder that is hidden, or that macOS, Windows, a NAS or fsck has made."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS
