"""The detection example: its pictures, its score, and that any number of processes takes the same steps."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_lb.data.builtin.named import open_digits
from hvd_lb.recipe import make_recipe
from hvd_lb.trained.weights import metadata_of
from hvd_lb.training.checkpoint import save_tensors
from hvd_lb.training.models import build_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "detection"
K = 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def modules() -> Any:
    sys.path.insert(0, str(EXAMPLE))
    try:
        import coco
        import garments

        yield coco, garments
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def pictures(modules: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of digits, which come with hvd-lb."""
    folder = tmp_path_factory.mktemp("pictures")
    modules[1].make(folder, open_digits(), {"train": 12, "val": 30}, seed=3)
    return folder


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.*")):
        content = file.read_bytes() if file.suffix == ".json" else np.asarray(Image.open(file)).tobytes()
        found.update(f"{file.relative_to(folder)} {hashlib.sha256(content).hexdigest()}".encode())
    return found.hexdigest()


def test_pictures_are_a_function_of_the_seed(modules: Any, pictures: Path, tmp_path: Path) -> None:
    again, others = tmp_path / "again", tmp_path / "others"
    modules[1].make(again, open_digits(), {"train": 12, "val": 30}, seed=3)
    modules[1].make(others, open_digits(), {"train": 12, "val": 30}, seed=4)
    assert digest(again) == digest(pictures) != digest(others)


def test_annotations_tell_what_is_seen(modules: Any, pictures: Path) -> None:
    told = json.loads((pictures / "val.json").read_text())
    crowds = 0
    for image in told["images"]:
        of = [one for one in told["annotations"] if one["image_id"] == image["id"]]
        masks = [modules[0].mask_of(one["segmentation"], image["height"], image["width"]) for one in of]
        assert np.max(np.sum(masks, 0)) <= 1  # who lies above hides who lies below
        for one, mask in zip(of, masks, strict=True):
            rows, columns = np.nonzero(mask)
            left, top, width, height = one["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert one["area"] == mask.sum() >= 40
            crowds += one["iscrowd"]
    assert len(told["annotations"]) > 1.5 * len(told["images"])
    assert 0 < crowds < 10


def test_a_picture_is_flipped_with_its_boxes_and_masks(modules: Any, pictures: Path) -> None:
    coco = modules[0]
    shown, target = coco.Pictures(pictures, "train")[1]
    flipped, other = coco.flipped(shown, target)
    assert torch.equal(flipped[:, 5, 10], shown[:, 5, 53])
    for mask, box in zip(other["masks"], other["boxes"], strict=True):
        rows, columns = np.nonzero(mask.numpy())
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    again, target_again = coco.flipped(flipped, other)
    assert torch.equal(again, shown)
    assert all(torch.equal(target_again[name], target[name]) for name in target)


def test_who_finds_everything_has_an_ap_of_1(modules: Any, pictures: Path) -> None:
    pytest.importorskip("pycocotools")
    coco = modules[0]
    val = coco.Pictures(pictures, "val")
    right, moved = [], []
    for index, image_id in enumerate(val.ids):
        target = val[index][1]
        scores = torch.linspace(1, 0.5, len(target["labels"]))
        output = {**target, "scores": scores, "masks": target["masks"][:, None].float()}
        right += coco.found_in(image_id, output, val.categories)
        # Half of a box away, no box or mask is found.
        away = {**output, "boxes": output["boxes"] + 20, "masks": output["masks"].roll(20, dims=3)}
        moved += coco.found_in(image_id, away, val.categories)
    figures = coco.average_precision(val.annotations, right)
    assert figures == pytest.approx(dict.fromkeys(("box_ap", "box_ap50", "mask_ap", "mask_ap50"), 100.0))
    assert max(coco.average_precision(val.annotations, moved).values()) < 10
    assert set(coco.average_precision(val.annotations, []).values()) == {0.0}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_coco_s_own_files_are_read(modules: Any, tmp_path: Path) -> None:
    """Polygons, of which an object may have several; compressed run lengths; categories whose numbers have gaps."""
    coco_mask = pytest.importorskip("pycocotools.mask")
    blob = np.random.default_rng(0).random((40, 60)) < 0.3
    compressed = coco_mask.encode(np.asfortranarray(blob.astype(np.uint8)))
    rectangles = [[10, 20, 30, 20, 30, 35, 10, 35], [40, 5, 50, 5, 50, 10, 40, 10]]  # x and y of each corner
    segmentations = [rectangles, {**compressed, "counts": compressed["counts"].decode()}]
    annotations = [
        {"id": i + 1, "image_id": 7, "iscrowd": 0, "category_id": category, "bbox": [10, 5, 40, 30], "area": 350,
         "segmentation": segmentation}
        for i, (category, segmentation) in enumerate(zip((90, 3), segmentations, strict=True))
    ]  # fmt: skip
    told = {
        "images": [{"id": 7, "file_name": "7.png", "width": 60, "height": 40}],
        "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}],
        "annotations": annotations,
    }
    (tmp_path / "val.json").write_text(json.dumps(told))
    Image.new("RGB", (60, 40)).save(tmp_path / "7.png")
    val = modules[0].Pictures(tmp_path, "val")
    _, target = val[0]
    expected = np.zeros((40, 60), np.uint8)
    expected[20:35, 10:30] = expected[5:10, 40:50] = 1
    assert target["masks"].numpy().tolist() == [expected.tolist(), blob.astype(int).tolist()]
    assert target["labels"].tolist() == [2, 1]
    # The network's labels become COCO's again.
    output = {**target, "scores": torch.ones(2), "masks": target["masks"][:, None].float()}
    found = modules[0].found_in(7, output, val.categories)
    assert [one["category_id"] for one in found] == [90, 3]
    assert min(modules[0].average_precision(val.annotations, found).values()) == pytest.approx(100.0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("backbone") / "model.safetensors"
    recipe = make_recipe({"model": "resnet8", "num_classes": 10})
    save_tensors(build_model("resnet8", 10, seed=0).state_dict(), file, metadata_of(recipe, ()))
    return file


def test_two_processes_end_with_the_bits_of_one(
    horovodrun: Callable[..., Any], pictures: Path, backbone: Path, tmp_path: Path
) -> None:
    options = ["--backbone", backbone, "--workers", K, "--steps", 2, "--no-evaluate", "--reproducible"]
    command = [pictures, *options, "--output"]
    alone = [sys.executable, EXAMPLE / "train.py", *command, tmp_path / "one"]
    said = subprocess.run(list(map(str, alone)), capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    job = horovodrun(EXAMPLE / "train.py", 2, *command, tmp_path / "two")
    assert job.returncode == 0, job.output
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert "epoch 0: loss" in said.stdout
