"""A trainer whose k changes takes the same steps on any processes, and from any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_handing_over import Member, assert_equal
from test_trainer import Records, small_data, small_recipe
from test_wishes import one_initialisation  # noqa: F401 - a fixture
from together import together

from hvd_lb.plan.run_plan import RunPlan, Scale
from hvd_lb.recipe import Recipe
from hvd_lb.training.bad_images import BadImages
from hvd_lb.training.checkpoint import CheckpointStore, Snapshot, open_checkpoint
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

# 150 images: epoch 0 has 2 steps of 40, then 20 of each of the rest; epoch 1 goes back to 40 in its middle.
CHANGES = ((2, 2), (9, 4))


class Told(Records):
    def __init__(self) -> None:
        super().__init__()
        self.changes: list[dict[str, Any]] = []

    def rescale(self, record: dict[str, Any]) -> None:
        self.changes.append(record)


def recipe(**changes: Any) -> Recipe:
    given = {"gpus": 4, "per_gpu_batch": 10, "epochs": 3, "reproducible": True, "ema": 0.9, "together": 1}
    return small_recipe(**{**given, "eval_every": "1epoch", "log_every": 2, **changes})


def scales_of(recipe: Recipe, changes: Sequence[tuple[int, int]]) -> tuple[Scale, ...]:
    plan = recipe.run_plan(150)
    for step, workers in changes:
        plan = recipe.run_plan(150, scales=plan.rescaled(step, workers))
    return plan.scales


def make(recipe: Recipe, world: World | None = None, **more: Any) -> Trainer:
    return Trainer(
        recipe, small_data(), world or Solo(), device=torch.device("cpu"), threads=1,
        **{"observer": Told(), **more},
    )  # fmt: skip


def take(trainer: Trainer, until: int) -> Snapshot:
    trainer.model.train()
    while trainer.step < until:
        with trainer.kernels(), trainer.batches() as batches:
            trainer.train_step(batches)
            trainer._finish_step(None)
    return trainer.hand_over()


@pytest.mark.parametrize("last_batch", ["drop", "keep"])
def test_a_run_whose_processes_come_and_go_is_that_of_one(last_batch: str) -> None:
    """Two processes of two workers each, one, two again; beside one that has been told of it."""
    of = recipe(last_batch=last_batch, progressive_size=(8,), image_size=12)
    ends = [step for step, _ in CHANGES]
    plan = of.run_plan(150, scales=scales_of(of, CHANGES))
    ends.append(plan.end)

    def part(snapshot: Snapshot | None, number: int, world: World) -> Snapshot:
        scales = plan.scales[: number + 1]
        more: dict[str, Any] = {"carried": snapshot} if snapshot else {}
        trainer = make(of, world, scales=scales, per_process=2, membership=Member(), **more)
        return take(trainer, ends[number])

    def run(processes: Sequence[int]) -> Snapshot:
        snapshot = None
        for number, there in enumerate(processes):
            snapshot, *others = together(there, partial(part, snapshot, number))
            for other in others:
                assert_equal(snapshot, other)
        assert snapshot
        return snapshot

    rescaled, alone = run([2, 1, 2]), run([1, 1, 1])
    assert_equal(alone, rescaled)
    assert [scale.workers for scale in rescaled.saved.scales] == [4, 2, 4]
    assert rescaled.step == plan.end


@pytest.mark.usefixtures("no_save_left_out")
def test_it_goes_on_from_any_checkpoint(tmp_path: Path) -> None:
    of = recipe(checkpoint_every="1steps", last_batch="keep", keep_checkpoints=99)
    plan = RunPlan(of.sample_plan(150), of.epochs, scales_of(of, CHANGES))
    last = plan.scales[-1].step
    store = CheckpointStore(tmp_path / "run", 99)
    snapshot = take(make(of, scales=plan.scales[:1]), 2)
    snapshot = take(make(of, scales=plan.scales[:2], carried=snapshot), last)
    trainer = make(of, scales=plan.scales, carried=snapshot, store=store, per_process=2)
    trainer.fit()
    assert trainer.step == plan.end == trainer.end
    (told,) = trainer.observer.changes  # type: ignore[attr-defined]
    assert (told["step"], told["workers"], told["before"], told["global_batch"]) == (last, 4, 2, 40)
    evaluations = [record["step"] + 1 for record in trainer.observer.evaluations]  # type: ignore[attr-defined]
    firsts = [step for step in range(last + 1, plan.end + 1) if plan.at(step).begins == 0]
    assert evaluations == firsts
    found = store.newest_first()
    assert len(found) == plan.end - last
    for path in found[1::4]:
        again = CheckpointStore(tmp_path / "again" / path.name, 99)
        resumed = make(of, checkpoint=open_checkpoint(path), store=again, per_process=2)
        resumed.fit()
        assert resumed.run_plan.scales == plan.scales
        for file in found[0].iterdir():
            assert (again.newest_first()[0] / file.name).read_bytes() == file.read_bytes(), file.name


def test_losses_since_the_last_record_are_told_over_a_change() -> None:
    """A record has those of two steps of 40 images, and of one of the 20 that came after them."""

    def records(log_every: int) -> list[dict[str, Any]]:
        of = recipe(log_every=log_every)
        plan = of.run_plan(150, scales=scales_of(of, [(2, 2)]))
        before = make(of, scales=plan.scales[:1])
        trainer = make(of, scales=plan.scales, carried=take(before, 2))
        take(trainer, 3)
        return [*before.observer.training, *trainer.observer.training]  # type: ignore[attr-defined]

    each, (together,) = records(1), records(5)
    assert together["step"] == 2
    images = (40, 40, 20)
    mean = sum(of["loss"] * count for of, count in zip(each, images, strict=True)) / sum(images)
    assert together["loss"] == pytest.approx(mean, rel=1e-12)


def test_what_is_due_each_epoch_is_due_where_epochs_end_after_changes() -> None:
    of = recipe(last_batch="keep")
    trainer = make(of, scales=scales_of(of, [(2, 2), (8, 4)]))
    plan, due = trainer.run_plan, []
    assert plan.offset % plan.plan.steps_per_epoch
    for trainer.state.step in range(9, plan.end + 1):
        due += [trainer.step] * trainer.due("1epoch")
    assert due == [step for step in range(9, plan.end + 1) if plan.at(step).begins == 0]


def test_an_epoch_goes_on_over_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bad images counted since it began, and the average of weights at the image where warmup ends."""
    begun: list[bool] = []
    settle = BadImages.settle_step

    def watched(account: BadImages, *arguments: Any, first: bool, images: int) -> Any:
        begun.append(first)
        return settle(account, *arguments, first=first, images=images)

    monkeypatch.setattr(BadImages, "settle_step", watched)
    of = recipe(warmup="gradual", warmup_epochs=1.0, reference_batch=10)
    plan = of.run_plan(150, scales=scales_of(of, [(2, 2)]))
    trainer = make(of, scales=plan.scales, carried=take(make(of, scales=plan.scales[:1]), 2))
    take(trainer, 7)
    assert begun == [True, False, *(False, False, False), True, False]
    # 7 steps of 20 images are an epoch; 2 of 40 were taken in place of the first 4.
    assert trainer.state.average is not None
    assert trainer.state.average._begins == 7 - 2
