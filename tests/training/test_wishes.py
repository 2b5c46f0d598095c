"""What is said to all in every step rides with the gradients: nothing else is exchanged, and all hear the same."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_any_processes import small_data, small_recipe
from test_bad_images_account import Files, Told
from test_trainer import Records
from together import Together, together

from hvd_lb.data.images import Dataset
from hvd_lb.errors import UserError
from hvd_lb.training.checkpoint import CheckpointStore
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World


@pytest.fixture(autouse=True)
def one_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share torch's random numbers."""
    fresh = build_model("resnet8", 5, seed=0)
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))


def make_trainer(world: World, data: Dataset | None = None, lag: bool = False, **arguments: Any) -> Trainer:
    of_trainer = ("store", "stop_requested", "observer", "membership", "carried", "unfinished")
    options = {name: arguments.pop(name) for name in of_trainer if name in arguments}
    trainer = Trainer(
        small_recipe(epochs=2, last_batch="keep", **arguments), data or small_data(), world,
        device=torch.device("cpu"), threads=1, **{"observer": Records(), **options},
    )  # fmt: skip
    trainer.lag = int(lag)  # as on GPUs
    return trainer


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_step_exchanges_nothing_but_gradients(reproducible: bool) -> None:
    """And in the reproducible mode what its arithmetic needs: the largest terms, and batch norm's sums."""

    def exchanges(world: Together) -> list[Counter[str]]:
        trainer, counts = make_trainer(world, reproducible=reproducible, on_bad_image="skip"), []
        trainer.model.train()
        with trainer.kernels(), trainer.batches() as batches:
            for _ in range(5):  # the last one is short: a process may have nothing to do
                before = world._times.copy()
                trainer.train_step(batches)
                counts.append(world._times - before)
        return counts

    names = {"hvd_lb.optimizer.bucket.0"}
    if reproducible:
        names |= {"hvd_lb.batch_norm"}
        names |= {f"{name}.largest" for name in names}
    for counts in together(3, exchanges):
        assert counts == [dict.fromkeys(names, 1)] * 5


@pytest.mark.slow
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("lag", [False, True])
def test_all_stop_after_the_same_step_by_the_same_signal(
    tmp_path: Path, lag: bool, reproducible: bool
) -> None:
    """The largest of several; a process that has no images in a step is heard, too."""

    def run(world: World) -> tuple[int, int]:
        wishes = {0: {5: 2}, 1: {5: 15}, 2: {6: 1}}[world.rank]
        trainer = make_trainer(
            world, store=CheckpointStore(tmp_path), lag=lag, reproducible=reproducible,
            stop_requested=lambda: wishes.get(trainer.step + 1, 0),
        )  # fmt: skip
        trainer.fit()
        return trainer.step, trainer.stopped_by

    assert together(3, run) == [(6 if lag else 5, 15)] * 3
    assert (tmp_path / "last").resolve().name == f"step-{6 if lag else 5:08d}"


@pytest.mark.parametrize("lag", [False, True])
def test_a_wish_to_save_is_heard_by_all(tmp_path: Path, lag: bool) -> None:
    def run(world: World) -> tuple[list[int], int]:
        trainer = make_trainer(world, store=CheckpointStore(tmp_path), lag=lag, keep_checkpoints=99, steps=6)
        saved: list[int] = []
        trainer._save = lambda best=False: saved.append(trainer.step)  # type: ignore[method-assign, assignment]
        trainer.save_due = lambda: world.rank == 0 and trainer.step in (1, 3)  # type: ignore[assignment]
        trainer.fit()
        return saved, trainer.stopped_by

    assert together(2, run) == [([3, 5, 6] if lag else [2, 4, 6], 0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("lag", [False, True])
def test_bad_images_are_told_once_and_end_all_processes_at_the_same_step(lag: bool) -> None:
    told = [Told(), Told()]

    def run(world: World) -> tuple[int, int, str]:
        data = Dataset("files", Files(40, bad=[0, 7, 13]), Files(8, first=50))
        trainer = make_trainer(
            world, data, lag=lag, gpus=2, per_gpu_batch=4, on_bad_image="skip", max_bad_images=0.06,
            loader="torchvision", observer=told[world.rank],
        )  # fmt: skip
        try:
            trainer.fit()
        except UserError as error:
            return trainer.step, trainer.state.bad_images.in_epoch, str(error)
        return trainer.step, trainer.state.bad_images.in_epoch, ""

    first, second = together(2, run)
    assert first == second
    assert first[1] == 3
    assert "3 of the 40 training images" in first[2]
    assert {record["image"] for record in told[0].bad} == {0, 7, 13}
    assert len(told[0].bad) == 3
    assert not told[1].bad


@pytest.mark.parametrize("lag", [False, True])
def test_bad_images_of_an_epoch_are_in_its_checkpoint(tmp_path: Path, lag: bool) -> None:
    def run(world: World) -> int:
        data = Dataset("files", Files(40, bad=[0, 7, 13]), Files(8, first=50))
        trainer = make_trainer(
            world, data, lag=lag, gpus=2, per_gpu_batch=4, on_bad_image="skip", max_bad_images=0.2, steps=5,
            loader="torchvision", store=CheckpointStore(tmp_path), checkpoint_every="1epoch",
        )  # fmt: skip
        trainer.fit()
        return trainer.state.bad_images.in_epoch

    assert together(2, run) == [3, 3]
    assert '"bad_images": 3' in (tmp_path / "last" / "state.json").read_text()
