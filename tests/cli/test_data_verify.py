"""`hvd-lb data verify`: every broken image on a line, and an exit code."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

KINDS = ["dali", "torchvision"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hvd_lb.data.files.reading.RETRY_AFTER_SECONDS", (0.001,))
    folder = tmp_path / "data"
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                levels = random.integers(0, 256, (30, 24 + i, 3), np.uint8)
                Image.fromarray(levels).save(folder / split / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder


def test_a_whole_data_set_is_said_to_be_so(hvd_lb, data: Path) -> None:
    for loader in KINDS:
        said = hvd_lb("data", "verify", data, "--loader", loader)
        assert (said.status, said.out) == (0, "24 images, all whole\n")


@pytest.mark.parametrize("loader", KINDS)
def test_everything_that_is_broken_is_listed(hvd_lb, loader: str, data: Path, tmp_path: Path) -> None:
    train = data / "train" / "ant"
    (train / "0.png").write_bytes(b"")
    (train / "1.jpg").write_text("not found")
    (train / "2.png").write_bytes((train / "2.png").read_bytes()[:-200])
    (train / "3.jpg").write_bytes((train / "3.jpg").read_bytes()[:-200])
    (train / "4.png").write_bytes(b"P6 20000 20000 255\n")
    strange = data / "val" / "bee" / "new\nline \udcff.jpg"
    os.rename(data / "val" / "bee" / "5.jpg", strange)
    strange.write_bytes(strange.read_bytes()[:-100])
    said = hvd_lb("data", "verify", data, "--loader", loader, "--json", tmp_path / "found.json")
    assert said.status == 1
    *lines, last = said.out.splitlines()
    assert last == "24 images decoded, 6 failed"
    assert [line.partition(": ")[0] for line in lines] == [
        *(str(train / name) for name in ("0.png", "1.jpg", "2.png", "3.jpg", "4.png")),
        str(data / "val" / "bee" / "new") + r"\nline \udcff.jpg",
    ]
    assert all(line.partition(": ")[2] for line in lines)
    assert "400000000 pixels" in lines[4]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 24
    assert [of["path"] for of in found["bad"]] == [
        *(str(train / f"{n}") for n in ("0.png", "1.jpg", "2.png", "3.jpg", "4.png")),
        str(strange),
    ]
    assert [of["split"] for of in found["bad"]] == ["train"] * 5 + ["val"]


def test_more_pixels_than_allowed_are_bad(hvd_lb, data: Path) -> None:
    said = hvd_lb("data", "verify", data, "--max-pixels", 28 * 30)
    assert said.status == 1
    assert said.out.count("29 x 30 pixels are more than the 840 of --max-pixels") == 4


@pytest.mark.parametrize("loader", KINDS)
def test_what_cannot_be_read_is_listed_and_ends_nothing(
    hvd_lb, loader: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = data / "train" / "ant" / "3.jpg"
    (data / "train" / "bee" / "0.png").write_bytes(b"")
    read = os.preadv

    def fails(descriptor: int, *arguments: object) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(gone):
            raise OSError(5, "Input/output error")
        return read(descriptor, *arguments)

    monkeypatch.setattr("os.preadv", fails)
    said = hvd_lb("data", "verify", data, "--loader", loader)
    assert said.status == 1
    assert f"{gone}: cannot be read (Input/output error, 2 times)" in said.out
    assert "24 images decoded, 2 failed" in said.out


@pytest.mark.parametrize("loader", KINDS)
def test_a_png_with_a_wrong_checksum_is_bad(loader: str, hvd_lb, data: Path) -> None:
    path = data / "val" / "ant" / "0.png"
    content = path.read_bytes()
    end = content.index(b"IEND") - 4
    path.write_bytes(content[: end - 4] + zlib.crc32(b"other").to_bytes(4, "big") + content[end:])
    said = hvd_lb("data", "verify", data, "--loader", loader)
    assert said.status == 1
    assert f"{path}: wrong checksum of 'IDAT', so it was damaged" in said.out


def test_files_that_are_no_images_are_all_listed(hvd_lb, data: Path) -> None:
    strangers = [data / "train" / "ant" / "list.mat", data / "train" / "bee" / "notes.txt"]
    for path in strangers:
        path.write_bytes(b"text")
    said = hvd_lb("data", "verify", data)
    assert said.status == 1
    assert said.out.splitlines()[:2] == [f"{path}: no image file" for path in strangers]
    assert "move 2 files out" in said.out


@pytest.mark.parametrize("loader", KINDS)
def test_shards_and_lists_are_verified_like_folders(hvd_lb, loader: str, data: Path, tmp_path: Path) -> None:
    for path in (data / "train" / "ant" / "2.png", data / "val" / "bee" / "3.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    (data / "train" / "bee" / "1.jpg").write_bytes(b"no image")
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        with tarfile.open(shards / f"{split}-000000.tar", "w") as archive:
            for number, path in enumerate(sorted((data / split).glob("*/*"))):
                archive.add(path, f"{number:06d}{path.suffix}")
                label = tarfile.TarInfo(f"{number:06d}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(b"01"[path.parent.name == "bee" :][:1]))
        rows = [f"{path},{path.parent.name}\n" for path in sorted((data / split).glob("*/*"))]
        (tmp_path / f"{split}.csv").write_text("path,label\n" + "".join(rows))
    for source, names in (
        (shards, [": 000002.png: ", ": 000007.jpg: ", ": 000009.jpg: "]),
        (tmp_path / "train.csv", ["ant/2.png: ", "bee/1.jpg: ", "bee/3.jpg: "]),
    ):
        said = hvd_lb("data", "verify", source, "--loader", loader)
        assert said.status == 1, said
        *lines, last = said.out.splitlines()
        assert last == "24 images decoded, 3 failed"
        assert all(name in line for name, line in zip(names, lines, strict=True))


def test_named_data_sets_are_read_too(hvd_lb) -> None:
    assert hvd_lb("data", "verify", "digits").out == "1,797 images, all whole\n"


def test_no_data_is_bad_input(hvd_lb, tmp_path: Path) -> None:
    said = hvd_lb("data", "verify", tmp_path / "nowhere")
    assert said.status == 2
    assert "no such folder" in said.err
