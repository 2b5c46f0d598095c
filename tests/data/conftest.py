"""Pictures and folders to test on, and a cache of its own for every test."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import photo
from PIL import Image


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HVD_LB_DATA", raising=False)
    monkeypatch.setattr("hvd_lb.data.files.reading.RETRY_AFTER_SECONDS", (0.001, 0.002))


@pytest.fixture
def make_photo() -> Callable[..., Image.Image]:
    return photo


@pytest.fixture
def encode() -> Callable[..., np.ndarray]:
    """(image, format, options) to the bytes of a file."""

    def encode(image: Image.Image, kind: str, **options: object) -> np.ndarray:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return np.frombuffer(file.getvalue(), np.uint8)

    return encode


@pytest.fixture
def make_classes() -> Callable[..., Path]:
    """(folder, {class: count}) writes small images of different sizes, JPEG and PNG in turn."""

    def make(folder: Path, counts: dict[str, int]) -> Path:
        for name, count in counts.items():
            (folder / name).mkdir(parents=True)
            for i in range(count):
                photo(20 + i, 30, i).save(folder / name / (f"{i}.JPEG" if i % 2 else f"{i}.png"))
        return folder

    return make


@pytest.fixture
def make_dataset(make_classes: Callable[..., Path]) -> Callable[..., Path]:
    """(folder, per class) writes train/ and val/ with the classes ant, bee and cat."""

    def make(folder: Path, count: int = 4) -> Path:
        for split in ("train", "val"):
            make_classes(folder / split, dict.fromkeys(("ant", "bee", "cat"), count))
        return folder

    return make
