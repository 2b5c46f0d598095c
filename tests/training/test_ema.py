"""Averaged weights against torch's own average with the formula's decay, in memory, in checkpoints and evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import Records, make_trainer, small_recipe
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hvd_lb.errors import UserError
from hvd_lb.optim.average import WeightAverage
from hvd_lb.recipe import OPTIONS, merged_recipe
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.saved_state import AVERAGED, counted_error

DECAY, BATCH, BEGINS = 0.7, 128, 3


def decay(steps: int) -> float:
    """Of the update after so many steps: half of 256 images have the square root."""
    since = steps - BEGINS
    return 0.0 if since <= 0 else min(DECAY**0.5, (1 + since) / (10 + since))


def test_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    ours = WeightAverage(model, DECAY, BATCH, BEGINS)
    plain = [parameter.detach().clone() for parameter in model.parameters()]
    reached = 0
    for steps in range(1, 90):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(ours.share(steps))
        plain = [
            decay(steps) * e + (1 - decay(steps)) * w
            for e, w in zip(plain, model.parameters(), strict=True)
        ]  # fmt: skip
        torch.testing.assert_close(list(ours.tensors().values()), plain, rtol=1e-12, atol=1e-12)
        reached += decay(steps) == DECAY**0.5
        if steps <= BEGINS:
            assert all(map(torch.equal, ours.tensors().values(), model.parameters()))
    assert reached > 10


def test_twice_the_minibatch_reaches_over_the_same_images() -> None:
    model = nn.Linear(1, 1)
    once, twice = (WeightAverage(model, 0.999, batch, 0) for batch in (256, 512))
    long = 10**6
    assert 1 - twice.share(long) == pytest.approx((1 - once.share(long)) ** 2, rel=1e-12)


def watched(**changes: Any) -> tuple[Any, AveragedModel]:
    """A trainer after six steps, and torch's average of what it was after each: weights and running statistics."""
    trainer = make_trainer(small_recipe(ema=0.8, last_batch="keep", **changes))
    begins, kn = trainer.schedule.warmup_steps, trainer.recipe.global_batch

    def mean(average: Tensor, now: Tensor, count: Tensor | int) -> Tensor:
        since = int(count) - begins
        part = 0.0 if since <= 0 else min(0.8 ** (kn / 256), (1 + since) / (10 + since))
        return part * average + (1 - part) * now

    plain = AveragedModel(copy.deepcopy(trainer.model), avg_fn=mean, use_buffers=True)
    plain.n_averaged.fill_(0)
    trainer.model.train()
    with trainer.batches() as batches:
        for number in range(1, 7):
            trainer.train_step(batches)
            trainer.state.statistics.publish()
            plain.n_averaged.fill_(number)
            for average, now in zip(
                [*plain.module.parameters(), *plain.module.buffers()],
                [*trainer.model.parameters(), *trainer.model.buffers()],
                strict=True,
            ):
                average.data.copy_(
                    mean(average.data, now.data, number) if now.is_floating_point() else now
                )  # fmt: skip
    return trainer, plain


@pytest.mark.parametrize(
    "changes", [{}, {"gpus": 8, "warmup": "gradual", "warmup_epochs": 1, "learning_rate": 0.01}]
)
def test_weights_and_statistics_are_averaged(changes: dict[str, Any]) -> None:
    trainer, plain = watched(**changes)
    expected = plain.module.state_dict()
    found = {name.removeprefix(AVERAGED): of for name, of in trainer.state._averaged().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    apart = trainer.model.state_dict()["stem.1.running_mean"] - found["stem.1.running_mean"]
    assert apart.abs().max() > 1e-3
    own = copy.deepcopy(trainer.model.state_dict())
    with trainer.state.averaged():
        assert all(torch.equal(found[name], of) for name, of in trainer.model.state_dict().items())
    assert all(torch.equal(own[name], of) for name, of in trainer.model.state_dict().items())


def test_it_is_evaluated_saved_and_what_decides_is_its_error(tmp_path: Path) -> None:
    recipe = small_recipe(ema=0.9, eval_every="2steps", checkpoint_every="2steps", epochs=2)
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path, 9), observer=Records())
    trainer.fit()
    records = trainer.observer.evaluations  # type: ignore[attr-defined]
    assert all(record["ema_loss"] != record["loss"] for record in records)
    errors = {record["step"] + 1: record["ema_top1_error"] for record in records}
    best = open_checkpoint(tmp_path / "best")
    assert errors[best.step] == min(errors.values()) == best.saved.best_error
    assert counted_error(records[0]) == records[0]["ema_top1_error"]
    # A network of its own, which has that error.
    last = open_checkpoint(tmp_path / "last")
    assert last.averaged
    other = make_trainer(small_recipe(epochs=2))
    other.model.load_state_dict(load_file(last.averaged))
    other.state.statistics.adopt()
    other._evaluate(saved=True)
    assert other.told["eval"]["top1_error"] == records[-1]["ema_top1_error"]
    assert other.told["eval"]["loss"] == records[-1]["ema_loss"]


def test_a_run_without_has_no_such_file_and_its_checkpoints_do_not_go_on_with_it(tmp_path: Path) -> None:
    trainer = make_trainer(small_recipe(steps=1), store=CheckpointStore(tmp_path))
    trainer.fit()
    found = open_checkpoint(tmp_path / "last")
    assert found.averaged is None
    assert sorted(path.name for path in found.path.iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    with pytest.raises(UserError, match="ema: None → 0.9"):
        make_trainer(small_recipe(ema=0.9), checkpoint=found)


def test_a_damaged_average_is_found(tmp_path: Path) -> None:
    make_trainer(small_recipe(ema=0.9, steps=1), store=CheckpointStore(tmp_path)).fit()
    file = open_checkpoint(tmp_path / "last").averaged
    assert file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"model-ema\.safetensors is truncated or changed"):
        open_checkpoint(tmp_path / "last")


def test_statistics_taken_anew_are_not_the_averages() -> None:
    with pytest.raises(UserError, match=r"--ema 0\.9 with --recompute-bn 8: statistics are taken anew"):
        merged_recipe({OPTIONS: {"ema": 0.9, "recompute_bn": 8}})


@pytest.mark.slow
@pytest.mark.long
def test_commands_take_the_averaged_weights(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    said = hvd_lb(
        "simulate", "--data", "digits", "--run", "--device", "cpu", "--threads", 1, "--steps", 6, "--ema", 0.9,
        "--gpus", 2, "--output", tmp_path / "run",
    )  # fmt: skip
    assert said.status == 0, said.err
    assert "averaged weights: top-1 error" in said.out + said.err
    record = open_checkpoint(tmp_path / "run/checkpoints/last").saved.evaluation
    assert record
    for more, name in (((), "loss"), (("--ema",), "ema_loss")):
        table = hvd_lb("evaluate", tmp_path / "run", *more).out
        assert f"loss: {record[name]:.4f}" in table
    assert hvd_lb("export", tmp_path / "run", "--ema", "--format", "torch-export").status == 0
    card = (tmp_path / "run/exported/torch-export-ema/README.md").read_text()
    assert "averaged weights" in card
    assert f"{record['ema_top1_error']:.2f} %" in card
    refused = hvd_lb("evaluate", tmp_path / "run/checkpoints/last/model.safetensors", "--ema")
    assert refused.status == 2
    assert "name a run or a checkpoint" in refused.err
    assert hvd_lb("verify", tmp_path / "run", "--segments", 1).status == 0
