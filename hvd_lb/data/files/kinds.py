"""The kinds of image files that are read, told by their extension; names that lie beside images and mean nothing."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
GIF = "GIF is not read: convert it to PNG"

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


def is_ignored(name: str) -> bool:
    """Whether this is the name of a file or folder that is hidden, or that macOS, Windows, a NAS or fsck has made."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS
