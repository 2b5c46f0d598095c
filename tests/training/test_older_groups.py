"""A run of LARS or LAMB that an older version began, where biases had trust ratios too, goes on as it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_trainer, small_recipe

from hvd_lb.optim import parameter_groups
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.trainer import Trainer

pytestmark = pytest.mark.slow


def older(model: torch.nn.Module, weight_decay: float, **_: Any) -> list[dict[str, Any]]:
    return parameter_groups(model, weight_decay)


def run(folder: Path, optimizer: str, steps: int, resume: bool = False) -> Trainer:
    recipe = small_recipe(
        optimizer=optimizer, learning_rate=0.01, steps=steps, checkpoint_every="4steps", weight_decay=0.1
    )
    more = {"checkpoint": open_checkpoint(folder / "last")} if resume else {}
    trainer = make_trainer(recipe, store=CheckpointStore(folder), **more)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_its_groups_stay(optimizer: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_lb.optim.make.parameter_groups", older)
        whole = run(tmp_path / "whole", optimizer, 8)
        run(tmp_path / "run", optimizer, 4)
    found, anew = run(tmp_path / "run", optimizer, 8, resume=True), run(tmp_path / "new", optimizer, 8)
    for (name, a), b in zip(whole.model.state_dict().items(), found.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    [bias] = [p for name, p in anew.model.named_parameters() if name == "fc.bias"]
    assert any(p is bias for p in anew.state.optimizer.param_groups[1]["params"])
    assert not torch.equal(whole.model.fc.bias, bias)  # type: ignore[arg-type, union-attr]
    # A run of today's goes on with today's groups.
    run(tmp_path / "today", optimizer, 4)
    again = run(tmp_path / "today", optimizer, 8, resume=True)
    for a, b in zip(anew.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
