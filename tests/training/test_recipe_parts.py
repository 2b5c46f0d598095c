"""Each part of today's recipes, bit by bit: the same with 1, 2 and 3 processes that share 5 virtual workers unevenly,
and the same when a run stops in mid-epoch and goes on with other processes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Records, small_data, small_recipe
from together import together

from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

pytestmark = pytest.mark.slow

PARTS: list[dict[str, Any]] = [
    {"ema": 0.9, "class_weights": "balanced"},
    {"optimizer": "lamb", "learning_rate": 0.02, "repeated_augment": 3},
    {"sampling": "balanced", "progressive_size": (4, 6), "epochs": 3},
]


@pytest.fixture(autouse=True)
def one_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share torch's random numbers."""
    fresh = build_model("resnet8", 5, seed=0)
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))


def run(world: World, folder: Path, *, resume: bool = False, **changes: Any) -> list[dict[str, Any]]:
    recipe = small_recipe(
        **{"reproducible": True, "precision": "fp32", "gpus": 5, "last_batch": "keep", "epochs": 2,
           "eval_every": "3steps", "checkpoint_every": "4steps", "log_every": 1, **changes}
    )  # fmt: skip
    observer = Records()
    trainer = Trainer(
        recipe, small_data(), world, device=torch.device("cpu"), threads=1, observer=observer,
        store=CheckpointStore(folder), checkpoint=open_checkpoint(folder / "last") if resume else None,
    )  # fmt: skip
    trainer.fit()
    return observer.evaluations


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "last").glob("*.safetensors"))}


@pytest.mark.parametrize("changes", PARTS, ids=lambda changes: "-".join(changes))
def test_neither_processes_nor_a_stop_change_a_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    evaluations = run(Solo(), tmp_path / "1", **changes)
    shared = together(3, lambda world: run(world, tmp_path / "3", **changes))
    assert files(tmp_path / "3") == files(tmp_path / "1")
    assert shared[0] == evaluations
    together(2, lambda world: run(world, tmp_path / "2", steps=5, **changes))
    together(3, lambda world: run(world, tmp_path / "2", resume=True, **changes))
    assert files(tmp_path / "2") == files(tmp_path / "1")
