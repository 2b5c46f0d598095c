"""The account of stand-ins: told once in the plan's order, bounded, part of a checkpoint, left out of evaluations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_lb.data.decoding.stand_in import StandIn
from hvd_lb.data.images import Dataset
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Origin
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.bad_images import BadImages
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

Record = dict[str, Any]


class Files:
    """PNG files in memory, some of them cut short."""

    encoded = True
    classes = ["dark", "bright"]

    def __init__(self, count: int, bad: Sequence[int] = (), first: int = 0) -> None:
        self.labels = np.arange(count, dtype=np.int64) % 2
        self.widths = self.heights = np.full(count, 8, np.int32)
        self.files = []
        for number in range(first, first + count):
            random = np.random.default_rng(number)
            file = io.BytesIO()
            levels = random.integers(0, 120, (8, 8, 3)) + 100 * (number % 2)
            Image.fromarray(levels.astype(np.uint8)).save(file, "PNG")
            self.files.append(np.frombuffer(file.getvalue(), np.uint8))
        for number in bad:
            self.files[number] = self.files[number][:-40]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        return [self.files[i] for i in ids]

    def name(self, image_id: int) -> str:
        return f"file {image_id}"

    def evidence(self, start: int, stop: int) -> tuple[bytes, bytes]:
        return b"".join(file.tobytes() for file in self.files[start:stop]), b""


class Told(SilentObserver):
    def __init__(self) -> None:
        self.bad: list[Record] = []
        self.evaluations: list[Record] = []

    def bad_images(self, records: Sequence[Record]) -> None:
        self.bad += records

    def evaluation(self, record: Record) -> None:
        self.evaluations.append(record)


def make_trainer(train: Files, val: Files, told: Told | None = None, **arguments: Any) -> Trainer:
    store, checkpoint = arguments.pop("store", None), arguments.pop("checkpoint", None)
    recipe = Recipe(
        **{
            "model": "resnet8", "image_size": 8, "gpus": 2, "per_gpu_batch": 4, "epochs": 2, "precision": "fp64",
            "on_bad_image": "skip", "max_bad_images": 0.2, "loader": "torchvision", "eval_crop": 1.0, **arguments,
        }
    )  # fmt: skip
    return Trainer(
        recipe,
        Dataset("files", train, val),
        Solo(),
        device=torch.device("cpu"),
        threads=1,
        observer=told or Told(),
        store=store,
        checkpoint=checkpoint,
    )


def stand_in(worker: int, position: int, step: int = 0) -> StandIn:
    return StandIn(Origin("train", 0, step, worker), position, 4, "a/4.png", "cut short", 5, "a/5.png")


def account(limit: float = 0.5) -> tuple[BadImages, list[Record]]:
    written: list[Record] = []
    return BadImages(Solo(), True, limit, written.extend), written


def test_each_is_written_once_in_the_plans_order() -> None:
    bad, written = account()
    bad.record([stand_in(1, 0)])
    bad.record([stand_in(0, 3), stand_in(0, 1)])
    assert bad.settle() == 3
    assert bad.settle() == 0
    assert [(of["worker"], of["position"]) for of in written] == [(0, 1), (0, 3), (1, 0)]
    assert written[0] == {
        "of": "train", "epoch": 0, "step": 0, "worker": 0, "position": 1, "image": 4, "path": "a/4.png",
        "reason": "cut short", "stand_in": 5, "stand_in_path": "a/5.png",
    }  # fmt: skip


def test_those_of_a_step_that_is_taken_again_are_forgotten() -> None:
    bad, written = account()
    bad.record([stand_in(0, 0)])
    bad.discard()
    assert bad.settle() == 0
    assert not written


def test_the_limit_is_a_share_of_the_images_of_one_epoch() -> None:
    bad, _ = account(0.02)
    for step in range(6):
        bad.record([stand_in(0, 0, step)])
        bad.settle_step(bad.take(), 1, first=step % 2 == 0, images=100)
    bad.record([stand_in(0, 0, 6)])
    with pytest.raises(UserError, match="3 of the 100 training images .* --max-bad-images 0.02"):
        bad.settle_step(bad.take(), 1, first=False, images=100)


def test_nothing_is_exchanged_unless_images_may_be_skipped() -> None:
    world = cast(World, None)
    assert BadImages(world, False, 0.0, lambda records: None).settle() == 0


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_an_evaluation_leaves_bad_images_out(loader: str) -> None:
    """The figures are those of the other images alone: the same network, as both trained on the same images."""
    whole, broken, told = Files(30, first=50), Files(30, bad=[0, 5, 29], first=50), Told()
    of_whole = make_trainer(Files(32), whole, loader=loader)
    of_broken = make_trainer(Files(32), broken, told, loader=loader, ema=0.9)  # evaluated twice, told once
    kept = [number for number in range(30) if number not in (0, 5, 29)]
    for name in ("labels", "widths", "heights"):
        setattr(whole, name, getattr(whole, name)[kept])
    whole.files = [whole.files[number] for number in kept]
    a, b = of_whole.fit(), of_broken.fit()
    assert a is not None
    assert b is not None
    assert b.images == a.images == 27
    assert b.top1_error == a.top1_error
    assert b.loss == pytest.approx(a.loss, rel=1e-12)
    assert [(of["of"], of["epoch"], of["worker"], of["position"]) for of in told.bad] == [
        ("eval", epoch, batch, position) for epoch in (0, 1) for batch, position in ((0, 0), (1, 1), (7, 1))
    ]


def test_a_rotten_validation_set_ends_the_run() -> None:
    with pytest.raises(UserError, match="2 of the 9 validation images cannot be decoded"):
        make_trainer(Files(16), Files(9, bad=[1, 2])).fit()


def test_the_count_of_an_epoch_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    bad = range(0, 32, 4)
    begun = make_trainer(Files(32, bad), Files(8), store=store, steps=2, max_bad_images=0.2)
    with pytest.raises(UserError, match="of the 32 training images") as without_a_stop:
        make_trainer(Files(32, bad), Files(8), max_bad_images=0.2).fit()
    begun.fit()
    first_two = begun.state.bad_images.in_epoch
    assert first_two > 0
    goes_on = make_trainer(
        Files(32, bad), Files(8), checkpoint=open_checkpoint(tmp_path / "last"), max_bad_images=0.2
    )
    assert goes_on.state.bad_images.in_epoch == first_two
    with pytest.raises(UserError) as with_one:
        goes_on.fit()
    assert str(with_one.value) == str(without_a_stop.value)
