"""The gradient noise scale of a run: the same for any number of processes, and off where it is not wanted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_any_processes import one_initialisation, run
from test_step_cost import Operators
from together import together

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.optim.noise_scale import NoiseScale
from hvd_lb.recipe import Recipe, make_recipe
from hvd_lb.report.metrics import RunObserver, SilentObserver, read_metrics
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

pytestmark = pytest.mark.slow
__all__ = ["one_initialisation"]


@pytest.fixture(autouse=True)
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_lb.optim.noise_scale.EVERY", 1)


def test_every_16th_step_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert len(parts(run(Solo(), tmp_path, steps=3))) == 1  # the first
    assert [step for step in range(33) if NoiseScale().due(step)] == [0, 16, 32]


def parts(trainer: Trainer) -> list[tuple[float, float]]:
    assert trainer.noise_scale is not None
    trainer.noise_scale.estimate()
    return list(trainer.noise_scale._parts)


@pytest.mark.parametrize("changes", [{}, {"precision": "fp32", "reproducible": True}])
def test_it_does_not_depend_on_the_number_of_processes(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"together": 1, **changes}
    expected = parts(run(Solo(), tmp_path / "one", steps=3, **changes))
    several = together(3, lambda world: run(world, tmp_path / "three", steps=3, **changes))
    assert len(expected) == 3
    assert parts(several[0]) == [pytest.approx(step, rel=1e-5) for step in expected]
    assert [trainer.noise_scale for trainer in several[1:]] == [None, None]


def test_off(tmp_path: Path) -> None:
    assert run(Solo(), tmp_path, steps=1, noise_scale="off").noise_scale is None
    assert run(Solo(), tmp_path / "alone", steps=1, gpus=1, per_gpu_batch=8).noise_scale is None


@pytest.mark.parametrize(("given", "expected"), [("off", "off"), (False, "off"), (True, "on")])
def test_yaml_s_words_for_false_and_true(given: object, expected: str) -> None:
    assert make_recipe({"noise_scale": given}).noise_scale == expected


def test_a_record(tmp_path: Path) -> None:
    observer = RunObserver(RunDirectory(tmp_path), 0)
    record = {"epoch": 0, "step": 9, "noise_scale": None, "low": 40.0, "high": None}
    observer.noise(record)
    observer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "noise", **record}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["high"] is None


def operators_of(noise_scale: str) -> tuple[int, int]:
    """Those that compute in one step of a run of two workers, and those that wait for a device."""
    few = ArrayImages(np.zeros((99, 8, 8), np.uint8), np.zeros(99, np.int64), list("ab"), "few")
    fields = {
        "model": "resnet8",
        "image_size": 8,
        "gpus": 2,
        "per_gpu_batch": 2,
        "num_classes": 2,
        "together": 1,
    }
    trainer = Trainer(
        Recipe.model_validate({**fields, "threads": 1, "noise_scale": noise_scale}),
        Dataset("few", few, few),
        Solo(),
        device=torch.device("cpu"),
        threads=1,
        observer=SilentObserver(),
    )
    trainer.model.train()
    batch = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    with trainer.kernels():
        trainer.train_step(itertools.repeat(batch))
        with Operators() as operators:
            trainer.train_step(itertools.repeat(batch))
    return sum(operators.counts.values()), operators.counts["_local_scalar_dense.default"]


def test_it_takes_a_few_operators_and_no_wait() -> None:
    (on, waits_on), (off, waits_off) = (operators_of(state) for state in ("on", "off"))
    assert 0 < on - off <= 16  # resnet8 has one bucket: its norm twice, and what adds norms of buckets up
    assert waits_on == waits_off
