"""DALI's nvJPEG is the one that was installed with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_lb.data.loading.nvjpeg import NEEDED, load_nvjpeg


def test_an_older_one_on_the_path_does_not_come_first(tmp_path: Path) -> None:
    """torchvision brings one; here it stands for a CUDA toolkit's. By its name DALI's extension asks for it."""
    import torchvision

    libraries = Path(torchvision.__file__).parents[1] / "torchvision.libs"
    older = next(libraries.glob("libnvjpeg*.so.13"), None)
    if load_nvjpeg() is None or older is None:
        pytest.skip("no nvJPEG is installed here")
    shutil.copy(older, tmp_path / "libnvjpeg.so.13")
    code = """
import ctypes, sys
if sys.argv[1] == "first":
    from hvd_lb.data.loading.nvjpeg import load_nvjpeg
    load_nvjpeg()
ctypes.CDLL("libnvjpeg.so.13")
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libnvjpeg.so" in line})
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"}

    def mapped(first: str) -> list[str]:
        command = [sys.executable, "-c", code, first]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert mapped("") == [str(tmp_path / "libnvjpeg.so.13")]
    (found,) = mapped("first")
    assert not found.startswith(str(tmp_path))


def test_what_is_installed_with_dali_decodes_windows() -> None:
    version = load_nvjpeg()
    if version is None:
        pytest.skip("no nvJPEG is installed here")
    assert version >= NEEDED
