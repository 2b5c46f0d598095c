"""digits and fashion-mnist."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from hvd_lb.data.builtin import named as named_module
from hvd_lb.data.builtin.named import FASHION_CLASSES, read_idx
from hvd_lb.data.dataset import open_dataset
from hvd_lb.errors import UserError


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, suffix: str, count: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8))
    return pixels


@pytest.fixture
def _no_system_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_module, "_DEBIAN_FOLDER", tmp_path / "not-installed")


def test_digits_are_those_of_scikit_learn() -> None:
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    digits = open_dataset("digits")
    held_out = np.arange(len(reference.images)) % 5 == 4
    assert (len(digits.train), len(digits.val)) == (1438, 359)
    for images, chosen in ((digits.train, ~held_out), (digits.val, held_out)):
        pixels = np.stack(images.read(np.arange(len(images))))
        np.testing.assert_array_equal(np.rint(pixels[..., 0] * (16 / 255)), reference.images[chosen])
        assert (pixels == pixels[..., :1]).all()
        np.testing.assert_array_equal(images.labels, reference.target[chosen])
        assert images.classes == [str(name) for name in reference.target_names]
    assert pixels.max() == 255


def test_digits_split_does_not_depend_on_the_seed() -> None:
    assert open_dataset("digits", seed=1).fingerprint() == open_dataset("digits", seed=2).fingerprint()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["data", "cache", "system"])
def test_fashion_mnist_is_found(
    suffix: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "system"
    monkeypatch.setattr(named_module, "_DEBIAN_FOLDER", system)
    monkeypatch.setenv("HVD_LB_DATA", str(tmp_path / "data"))
    folder = system if place == "system" else tmp_path / place / "FashionMNIST" / "raw"
    pixels = write_fashion(folder, suffix)
    data = open_dataset("fashion-mnist")
    assert data.train.classes == FASHION_CLASSES
    assert data.val.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(
        data.train.read(np.array([2]))[0], np.repeat(pixels[2][..., None], 3, axis=2)
    )
    assert data.train.name(2) == "fashion-mnist train[2]"


@pytest.mark.usefixtures("_no_system_copy")
def test_without_fashion_mnist_and_without_network_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # urllib keeps the opener that it has made first, with the proxies of that moment.
    monkeypatch.setattr("urllib.request._opener", None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist") as raised:
        open_dataset("fashion-mnist")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08\x03", b"\0\0\x0d\x01\0\0\0\x01abcd", struct.pack(">HBBI", 0, 8, 1, 9) + b"short"],
)
def test_a_broken_idx_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken-idx1-ubyte: cannot be read as IDX"):
        read_idx(path)
