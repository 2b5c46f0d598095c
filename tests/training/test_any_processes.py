"""The trainer on several processes is the trainer on one: threads stand for processes here, tests/whole_runs has real
ones.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Records, largest_difference, small_data, small_recipe
from together import together

from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share torch's random numbers."""
    fresh = build_model("resnet8", 5, seed=0)
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))


def run(
    world: World, folder: Path, steps: int | None = None, resume: bool = False, **changes: Any
) -> Trainer:
    recipe = small_recipe(
        epochs=2,
        steps=steps,
        last_batch="keep",
        eval_every="3steps",
        checkpoint_every="4steps",
        log_every=1,
        **changes,
    )
    trainer = Trainer(
        recipe, small_data(), world, device=torch.device("cpu"), threads=1, observer=Records(),
        store=CheckpointStore(folder), checkpoint=open_checkpoint(folder / "last") if resume else None,
    )  # fmt: skip
    trainer.fit()
    trainer.state.statistics.publish(trainer.step)
    return trainer


def assert_the_same(found: Trainer, expected: Trainer, first: int = 0) -> None:
    assert largest_difference(found.model, expected.model) < 1e-11
    for kind in ("training", "evaluations"):
        records = [getattr(trainer.observer, kind) for trainer in (found, expected)]
        wanted = [record for record in records[1] if record["step"] >= first]
        assert len(records[0]) == len(wanted)
        for a, b in zip(records[0], wanted, strict=True):
            for name in a.keys() - {"images_per_second", "data_wait", "peak_memory_gb"}:
                assert a[name] == pytest.approx(b[name], rel=1e-11), (name, a, b)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {}),
        (3, {"recompute_bn": 45}),
        (4, {"momentum_form": 9}),
        (3, {"gpus": 3}),
        (3, {"freeze": "backbone"}),
        (3, {"ema": 0.9}),
        (2, {"auto_augment": "trivialaugment", "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}),
        pytest.param(
            3, {"clip_norm": 0.85, "optimizer": "lars", "trust_coefficient": 0.02}, marks=pytest.mark.long
        ),
    ],
)
def test_a_run_in_float_mode(processes: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """In fp64, to rounding: losses, evaluations, weights and running statistics; the last step of an epoch is short."""
    alone = run(Solo(), tmp_path / "alone", **changes)
    found = together(processes, lambda world: run(world, tmp_path / "together", **changes))
    assert_the_same(found[0], alone)
    for other in found[1:]:
        assert largest_difference(other.model, found[0].model) == 0


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4)])
def test_a_run_that_goes_on_with_other_processes(before: int, after: int, tmp_path: Path) -> None:
    """From a checkpoint in mid-epoch: what each process knew alone has been put together."""
    whole = run(Solo(), tmp_path / "whole")
    together(before, lambda world: run(world, tmp_path / "parts", steps=7))
    found = together(after, lambda world: run(world, tmp_path / "parts", resume=True))
    assert_the_same(found[0], whole, first=7)


@pytest.mark.parametrize("reproducible", [False, True])
def test_weights_that_one_process_gets_wrong_end_the_run(reproducible: bool, tmp_path: Path) -> None:
    def broken(world: World) -> None:
        step = Trainer.train_step

        class Broken(Trainer):
            def train_step(self, loader: Any) -> bool:
                if self.step == 2 and world.rank == 1:
                    with torch.no_grad():
                        for parameter in self.model.parameters():
                            parameter += 1
                return step(self, loader)

        recipe = small_recipe(epochs=20, reproducible=reproducible)
        Broken(recipe, small_data(), world, device=torch.device("cpu"), threads=1, observer=Records()).fit()

    with pytest.raises(RuntimeError, match="one of them computes wrongly"):
        together(2, broken)
