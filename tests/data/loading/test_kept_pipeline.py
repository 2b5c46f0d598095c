"""A loader that came to its end leaves its DALI pipeline to the next: same tensors, errors and ends as by a new one."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken import good_file
from loader_cases import CPU, BlobImages, as_levels, load, random_batches

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.decoding import decode, plain
from hvd_lb.data.loading import dali
from hvd_lb.data.loading.open import Loaders
from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

LEVELS = as_levels(16)


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """All that were made."""
    made: list[weakref.ref[Any]] = []

    def make(*arguments: Any, **options: Any) -> dali.Pipeline:
        pipeline = real(*arguments, **options)
        made.append(weakref.ref(pipeline))
        return pipeline

    real = dali.Pipeline
    monkeypatch.setattr(dali, "Pipeline", make)
    return made


def alive(pipelines: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(pipeline() is not None for pipeline in pipelines)


def make_images(**broken: bytes) -> BlobImages:
    blobs = [good_file("JPEG" if number % 2 else "PNG", number) for number in range(6)]
    for number, content in broken.items():
        blobs[int(number[1:])] = content
    files = [np.frombuffer(blob, np.uint8) for blob in blobs]
    return BlobImages(files, [(40 + number % 7, 40 - number % 5) for number in range(6)])


def test_one_pipeline_for_loaders_one_after_another(pipelines: list[weakref.ref[Any]]) -> None:
    images = make_images()
    loaders = Loaders("dali", images, LEVELS, batch_size=6, device=CPU, threads=2)
    for count in (5, 1, 0, 2, 3):
        with loaders.open(iter(random_batches(images, count))) as loader:
            found = [x.clone() for x, _ in loader]
        expected = load("torchvision", images, random_batches(images, 5), LEVELS)[:count]
        assert len(found) == count
        assert all(map(torch.equal, found, expected))
    assert len(pipelines) == 1


def test_a_loader_that_is_left_early_leaves_nothing(pipelines: list[weakref.ref[Any]]) -> None:
    images = make_images()
    loaders = Loaders("dali", images, LEVELS, batch_size=6, device=CPU, threads=2)
    expected = load("torchvision", images, random_batches(images, 9), LEVELS)
    for _ in range(3):
        with loaders.open(random_batches(images, 9)) as loader:
            assert torch.equal(next(loader)[0], expected[0])
    with loaders.open(random_batches(images, 9)) as loader:
        assert all(map(torch.equal, [x.clone() for x, _ in loader], expected))
    assert (len(pipelines), alive(pipelines)) == (4, 1)
    del loaders, loader
    assert alive(pipelines) == 0


def test_of_several_loaders_at_a_time_one_pipeline_is_kept(pipelines: list[weakref.ref[Any]]) -> None:
    images = make_images()
    loaders = Loaders("dali", images, LEVELS, batch_size=6, device=CPU, threads=1)
    for _ in range(3):
        opened = [loaders.open(random_batches(images, 3)) for _ in range(3)]
        assert [len(list(loader)) for loader in opened] == [3, 3, 3]
        for loader in opened:
            loader.close()
    del opened, loader
    assert alive(pipelines) == 1


def test_after_an_image_that_dali_refuses_the_new_pipeline_is_kept(
    pipelines: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong checksum of image data, which PIL does not look at."""
    for module in (plain, decode):  # which else find it before DALI does
        monkeypatch.setattr(module, "essential", lambda content: content)
    png = good_file("PNG", 4)
    end = png.rindex(b"IEND") - 4
    images = make_images(_4=png[: end - 4] + bytes(4) + png[end:])
    loaders = Loaders("dali", images, LEVELS, batch_size=6, device=CPU, threads=2)
    expected = load("torchvision", images, random_batches(images, 2), LEVELS)
    for _ in range(3):
        with loaders.open(random_batches(images, 2)) as loader:
            assert all(map(torch.equal, [x.clone() for x, _ in loader], expected))
    assert len(pipelines) > 3
    assert alive(pipelines) == 1


def folder(path: Path, make_photo: Any) -> Path:
    for split, count in (("train", 4), ("val", 3)):
        for name in ("a", "b"):
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                make_photo(40, 40, number).save(path / split / name / f"{number}.png")
    return path


class Told(SilentObserver):
    def __init__(self) -> None:
        self.evaluations: list[dict[str, Any]] = []

    def evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)


def trainer(path: Path, told: Told, **recipe: Any) -> Trainer:
    chosen = Recipe(
        model="resnet8", image_size=16, gpus=2, per_gpu_batch=2, epochs=3, warmup="none", **recipe
    )  # fmt: skip
    return Trainer(chosen, open_dataset(str(path)), Solo(), device=CPU, threads=1, observer=told)


def test_a_run_has_one_pipeline_for_training_and_one_for_all_evaluations(
    tmp_path: Path, make_photo: Any, pipelines: list[weakref.ref[Any]]
) -> None:
    """And one more where batch norm is recomputed, which happens while that of training waits."""
    for recompute, count in ((None, 2), (4, 3)):
        pipelines.clear()
        told = Told()
        trainer(folder(tmp_path / str(count), make_photo), told, recompute_bn=recompute).fit()
        assert [record["images"] for record in told.evaluations] == [6, 6, 6]
        assert len(pipelines) == count


def test_a_validation_image_that_changes_between_evaluations_is_noticed(
    tmp_path: Path, make_photo: Any
) -> None:
    path = folder(tmp_path / "data", make_photo)

    class Changing(Told):
        def evaluation(self, record: dict[str, Any]) -> None:
            super().evaluation(record)
            make_photo(40, 40, 9).save(path / "val" / "b" / "1.png", compress_level=0)

    told = Changing()
    with pytest.raises(UserError, match=r"b/1\.png"):
        trainer(path, told).fit()
    assert len(told.evaluations) == 1
