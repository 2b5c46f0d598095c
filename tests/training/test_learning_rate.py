"""The learning rate that is told is the one by which the weights change, in every step, warmup's first and last too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import Records
from torch import nn

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.recipe import Recipe
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

# 320 images a step, 4 steps an epoch: two epochs of warmup from 0.1 to 0.125, and a tenth of that from epoch 4 of 6.
RATES = [0.1 + 0.025 * step / 8 for step in range(8)] + [0.125] * 8 + [0.0125] * 8


def brightness(count: int) -> ArrayImages:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    pixels = (60 * labels[:, None, None, None] + rng.integers(0, 90, (count, 2, 2, 3))).astype(np.uint8)
    return ArrayImages(pixels, labels, list("abc"), "brightness")


def make_trainer(
    monkeypatch: pytest.MonkeyPatch, steps: int | None = None, **more: Any
) -> tuple[Trainer, list[float]]:
    """A linear model without momentum and decay, and the rates in its optimizer whenever that steps."""

    def linear(*args: object, **kwargs: object) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    monkeypatch.setattr("hvd_lb.training.forward.build_model", linear)
    recipe = Recipe(
        model="resnet8", image_size=2, eval_crop=1.0, gpus=4, per_gpu_batch=80, epochs=6, warmup_epochs=2,
        drop_epochs=(60,), momentum=0.0, nesterov=False, weight_decay=0.0, log_every=1, precision="fp64", steps=steps,
    )  # fmt: skip
    trainer = Trainer(
        recipe, Dataset("brightness", brightness(1300), brightness(20)), Solo(), device=torch.device("cpu"),
        threads=1, observer=Records(), **more,
    )  # fmt: skip
    assert trainer.plan.steps_per_epoch == 4
    used: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        used.append(rates.pop())

    trainer.state.optimizer.optimizer.register_step_pre_hook(note)
    return trainer, used


def told(trainer: Trainer) -> dict[int, float]:
    return {record["step"]: record["lr"] for record in trainer.observer.training}  # type: ignore[attr-defined]


def test_in_every_step_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, used = make_trainer(monkeypatch)
    trainer.fit()
    assert used == pytest.approx(RATES, rel=1e-12)
    assert told(trainer) == dict(enumerate(used))
    assert (used[0], used[8], used[15]) == (0.1, 0.125, 0.125)


def test_after_a_stop_in_the_warmup_and_one_at_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rates: list[float] = []
    for stop in (7, 8, 24):
        last = tmp_path / "last"
        checkpoint = open_checkpoint(last) if last.exists() else None
        trainer, used = make_trainer(
            monkeypatch, steps=stop, store=CheckpointStore(tmp_path), checkpoint=checkpoint
        )
        trainer.fit()
        assert list(told(trainer).values()) == used
        rates += used
    assert rates == pytest.approx(RATES, rel=1e-12)


def test_the_weights_change_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without momentum and decay: by the rate times the gradient of the mean loss."""
    trainer, _ = make_trainer(monkeypatch)
    with trainer.batches() as batches, trainer.batches() as again:
        for step in range(3):
            plain = copy.deepcopy(trainer.model)
            plain.zero_grad()
            trainer.train_step(batches)
            x, y = map(torch.cat, zip(*(next(again) for _ in range(4)), strict=True))
            nn.functional.cross_entropy(plain(x.double()), y).backward()
            for p, new in zip(plain.parameters(), trainer.model.parameters(), strict=True):
                torch.testing.assert_close(new, p - RATES[step] * p.grad, rtol=1e-9, atol=1e-12)
