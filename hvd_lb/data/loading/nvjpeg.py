"""nvJPEG, by which DALI decodes on GPUs: the one that was installed with it, also where an older one lies on the path.

Before 13.2 it cannot decode a part of an image the way libjpeg does. DALI asks for a library by its name, and what
LD_LIBRARY_PATH leads to (a CUDA toolkit's) comes before DALI's own; but what is loaded already comes before either.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

#: The oldest that decodes windows on a GPU.
NEEDED = (13, 2)


def load_nvjpeg() -> tuple[int, ...] | None:
    """Loads that of the Python packages, if it is there, for DALI to find; its version, needs no GPU."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or () for file in Path(place).glob("*/lib/libnvjpeg.so.[1-9]*")]
    # That of another major version of CUDA may lie beside it.
    for file in sorted(files, key=lambda file: int(file.name.split(".")[2]), reverse=True):
        try:
            library = ctypes.CDLL(str(file))
            return tuple(_property(library, kind) for kind in range(3))
        except (OSError, AttributeError):  # of another machine or CUDA
            continue
    return None


def _property(library: ctypes.CDLL, kind: int) -> int:
    """The major, minor or patch version."""
    value = ctypes.c_int(-1)
    library.nvjpegGetProperty(kind, ctypes.byref(value))
    return value.value
