"""`hvd-lb data info` and `data preview` as their user meets them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def a_folder() -> None:
    """train/ and val/ with two classes of different sizes and formats, one image on its side, one broken."""
    for split in ("train", "val"):
        for number, (name, size) in enumerate((("ant", (40, 30)), ("ant", (600, 20)), ("bee", (64, 64)))):
            Path(split, name).mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            exif[274] = 6 if number == 1 else 1
            kind = "jpg" if number else "png"
            Image.new("RGB", size, (10, 20, 30)).save(Path(split, name, f"{number}.{kind}"), exif=exif)
    Path("train/bee/3.jpg").write_bytes(b"no image")


def test_info(hvd_lb: Run) -> None:
    a_folder()
    said = hvd_lb("data", "info", ".", "--sheet", "../sheet.png")
    assert said.status == 0, said.err
    rows = {line[:17].strip(): " ".join(line[17:].split()) for line in said.out.splitlines()}
    assert rows["."] == "train val"
    assert rows["images"] == "4 3"
    assert rows["classes"] == "2 2"
    assert rows["images in a class"] == "2 1 to 2, median 1"
    assert rows["broken headers"] == "1"
    assert rows["width"] == "40 to 600, median 64 40 to 600, median 64"
    assert rows["up to 64"].count("67 %") == 2
    assert rows["up to 1,024"].count("33 %") == 2
    assert rows["formats"].startswith("JPEG RGB 50 %, PNG RGB 25 %, unreadable 25 %")
    assert rows["EXIF orientation"].startswith("25 % turned or mirrored, which is ignored")
    assert "random images" not in said.out
    assert said.out.endswith("../sheet.png: 572 × 198 pixels\n")


def test_info_of_many_images_says_what_is_sampled(hvd_lb: Run) -> None:
    said = hvd_lb("data", "info", "digits")
    assert said.status == 0, said.err
    assert "train: formats, bytes and orientation are those of 1,000 random images of 1,438" in said.out
    assert os.listdir() == []


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_preview(loader: str, hvd_lb: Run) -> None:
    a_folder()
    more = ("--loader", loader, "--image-size", 32, "--per-gpu-batch", 2, "--on-bad-image", "skip")
    said = hvd_lb("data", "preview", "--data", ".", "--device", "cpu", "--output", "../p.png", *more)
    assert said.status == 0, said.err
    with Image.open("../p.png") as picture:
        width, height = picture.size
    assert said.out == f"../p.png: {width} × {height} pixels\n"
    assert sorted(os.listdir()) == ["train", "val"]


def test_preview_shows_the_first_images_of_the_run(hvd_lb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_lb.report.pictures import preview as pictures
    from hvd_lb.resolve import resolve

    shown = []
    draw = pictures.preview
    monkeypatch.setattr(pictures, "preview", lambda views, *more: shown.extend(views) or draw(views, *more))
    said = hvd_lb("data", "preview", "--data", "digits", "--seed", 7, "--gpus", 2, "--device", "cpu")
    assert said.status == 0, said.err
    plan = resolve({"data": "digits", "seed": 7, "gpus": 2}, recipe=None, default_gpus=1).plan
    assert [view.name for view in shown] == [f"digits train[{i}]" for i in plan.image_ids(0, 0, 0)[:4]]
    with Image.open("preview.png") as picture:
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("info", "nowhere"), "nowhere"),
        (("info", "digits", "--sheet", "sheet.jpg"), "does not end in .png"),
        (("info", "digits", "--sheet", "nowhere/sheet.png"), "'nowhere' is no folder"),
        (("info", "digits", "--val-fraction", 0.5), "--val-fraction 0.5"),
        (("preview", "--data", "nowhere"), "nowhere"),
        (("preview", "--data", "digits", "--output", "p.gif"), "does not end in .png"),
        (("preview", "--data", "digits", "--images", 0), "--images"),
        (
            ("preview", "--data", "digits", "--crop-scale", "2,3"),
            "--crop-scale 2,3: expected two increasing numbers",
        ),
        (("preview", "--data", "digits", "--recipe", "digitz"), "did you mean 'digits'"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: tuple[object, ...], told: str, hvd_lb: Run) -> None:
    said = hvd_lb("data", *arguments)
    assert said.status == 2
    assert told in said.err
    assert said.err.startswith("hvd-lb: error: ")
    assert said.err.count("\n") == 1
    assert os.listdir() == []
