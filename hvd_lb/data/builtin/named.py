"""Data sets known by name: `digits`, which comes with the package, and `fashion-mnist`, found or downloaded.

digits has no official split here: every fifth image (index % 5 == 4) is held out, whatever the seed.
"""

from __future__ import annotations

import gzip
import os
import struct
from importlib import resources
from pathlib import Path

import numpy as np

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.errors import UserError
from hvd_lb.machine.cache_folder import cache_folder

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
_FASHION_FILES = {
    split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for split, prefix in (("train", "train"), ("val", "t10k"))
}
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_HELD_OUT_EVERY = 5


def open_digits() -> Dataset:
    """scikit-learn's digits: 1,438 images of 8x8 pixels to train on, 359 held out."""
    with resources.files("hvd_lb.data.builtin").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        levels, labels = arrays["images"], arrays["labels"]
    pixels = ((levels.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    held_out = np.arange(len(labels)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    classes = [str(digit) for digit in range(10)]
    return Dataset(
        "digits",
        ArrayImages(pixels[~held_out], labels[~held_out], classes, "digits train"),
        ArrayImages(pixels[held_out], labels[held_out], classes, "digits val"),
    )


def open_fashion_mnist() -> Dataset:
    """Zalando's Fashion-MNIST, 60,000 + 10,000 images of 28x28; torchvision downloads it if not found."""
    folder = (
        next((folder for folder in fashion_folders() if _has_fashion(folder)), None) or _download_fashion()
    )
    splits = {}
    for split, (images, labels) in _FASHION_FILES.items():
        pixels = read_idx(_plain_or_gz(folder / images))
        splits[split] = ArrayImages(
            pixels, read_idx(_plain_or_gz(folder / labels)), FASHION_CLASSES, f"fashion-mnist {split}"
        )
    return Dataset("fashion-mnist", splits["train"], splits["val"])


def fashion_folders() -> list[Path]:
    """Where Fashion-MNIST's IDX files are looked for, plain or gzipped, in this order."""
    own = [Path(os.environ["HVD_LB_DATA"]) / "FashionMNIST" / "raw"] if os.environ.get("HVD_LB_DATA") else []
    return [*own, cache_folder() / "FashionMNIST" / "raw", _DEBIAN_FOLDER]


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file (the format of MNIST), gzipped when its name ends in .gz."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        if zeros != 0 or kind != 0x08:
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{path}: cannot be read as IDX ({error}); delete it and get it again") from error


def _plain_or_gz(path: Path) -> Path:
    return path if path.exists() else path.with_name(path.name + ".gz")


def _has_fashion(folder: Path) -> bool:
    return all(_plain_or_gz(folder / name).exists() for names in _FASHION_FILES.values() for name in names)


def _download_fashion() -> Path:
    from torchvision.datasets import FashionMNIST

    root = cache_folder()
    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        looked = ", ".join(str(folder) for folder in fashion_folders())
        raise UserError(
            f"fashion-mnist is not in {looked} and cannot be downloaded ({str(error).splitlines()[0]}); "
            "apt-get install dataset-fashion-mnist (Debian), or copy its four IDX files into one of them"
        ) from error
    return root / "FashionMNIST" / "raw"
