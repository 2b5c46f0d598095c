"""The norm of the gradient in the records of training: that of plain autograd, on any number of processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_any_processes import one_initialisation, run
from test_handing_over import member_trainer
from test_step_cost import Operators
from test_trainer import make_trainer, small_recipe
from together import together
from torch.nn import functional as F  # noqa: N812

from hvd_lb.training.checkpoint import Snapshot
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

pytestmark = pytest.mark.slow
__all__ = ["one_initialisation"]


def norms(trainer: Trainer) -> dict[int, float | None]:
    """Those that were told, by step."""
    records: Any = trainer.observer
    return {record["step"]: record["gradient_norm"] for record in records.training}


def fit_beside_plain_autograd(trainer: Trainer, dtype: torch.dtype) -> dict[int, float]:
    """Takes the trainer to its end; the norm of each step's mean gradient by `torch.autograd.grad`."""
    found = {}
    take = trainer.train_step

    def beside(batches: Any) -> bool:
        model, step = copy.deepcopy(trainer.model).to(dtype), trainer.step
        parts = [next(batches) for _ in trainer.workers]
        total = sum(F.cross_entropy(model(x.to(dtype)), y, reduction="sum") for x, y in parts)
        gradients = torch.autograd.grad(total, list(model.parameters()))  # type: ignore[arg-type]
        images = sum(len(y) for _, y in parts)
        found[step] = sum(float((g.double() / images).square().sum()) for g in gradients) ** 0.5
        return take(iter(parts))

    trainer.train_step = beside  # type: ignore[method-assign, assignment]
    trainer.fit()
    return found


@pytest.mark.parametrize(
    ("changes", "dtype", "relative"),
    [
        ({}, torch.float64, 1e-12),
        ({"clip_norm": 0.1}, torch.float64, 1e-12),  # before it is clipped
        ({"precision": "fp32", "reproducible": True}, torch.float32, 1e-4),
        ({"precision": "fp16", "clip_norm": 0.1}, torch.float32, 0.03),  # and not of the scaled loss
    ],
)
def test_it_is_that_of_plain_autograd(changes: dict[str, Any], dtype: torch.dtype, relative: float) -> None:
    trainer = make_trainer(small_recipe(log_every=2, steps=6, noise_scale="off", **changes))
    plain = fit_beside_plain_autograd(trainer, dtype)
    # Of the one step, and not of those before it.
    assert norms(trainer) == {1: pytest.approx(plain[1], rel=relative), 3: pytest.approx(plain[3], rel=relative),
                              5: pytest.approx(plain[5], rel=relative)}  # fmt: skip
    if "clip_norm" in changes:
        assert min(plain.values()) > changes["clip_norm"]


def test_that_of_a_short_step_is_over_its_images() -> None:
    """22 of 150 are left for the last step of an epoch."""
    trainer = make_trainer(small_recipe(log_every=1, steps=6, last_batch="keep", noise_scale="off"))
    assert trainer.run_plan.at(4).images == 22
    plain = fit_beside_plain_autograd(trainer, torch.float64)
    assert norms(trainer) == {step: pytest.approx(norm, rel=1e-12) for step, norm in plain.items()}


def test_its_bits_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    changes = {"precision": "fp32", "reproducible": True}
    alone = run(Solo(), tmp_path / "one", steps=5, **changes)
    several = together(3, lambda world: run(world, tmp_path / "three", steps=5, **changes))
    assert norms(several[0]) == norms(alone)
    assert len(norms(alone)) == 5


def test_only_steps_that_are_told_take_it_and_none_waits_for_it() -> None:
    trainer = make_trainer(small_recipe(log_every=2, noise_scale="off"))
    trainer.model.train()
    counts = []
    with trainer.kernels(), trainer.batches() as batches:
        for _ in range(4):
            with Operators() as operators:
                trainer.train_step(batches)
            counts.append(operators.counts)
    assert [count["_foreach_norm.Scalar"] for count in counts] == [0, 1, 0, 1]  # a bucket
    waits = [count["_local_scalar_dense.default"] for count in counts]
    assert waits == waits[:1] * 4


def test_who_takes_over_tells_that_of_the_last_step() -> None:
    """A process was lost between a step and its record."""

    def lost(world: World) -> tuple[Snapshot, float]:
        trainer = member_trainer(world, log_every=2, reproducible=True)
        with trainer.kernels(), trainer.batches() as batches:
            trainer.train_step(batches)
            trainer.train_step(batches)
        assert trainer.state.gradient_norm is not None
        return trainer.hand_over(), trainer.state.gradient_norm.item()

    (snapshot, norm), _ = together(2, lost)
    carried = Snapshot.from_bytes(snapshot.to_bytes())
    [trainer] = together(1, lambda world: told_of(world, carried))
    assert norms(trainer) == {1: norm}
    assert "gradient_norm" not in trainer.hand_over().state  # it is told once


def told_of(world: World, carried: Snapshot) -> Trainer:
    trainer = member_trainer(world, log_every=2, reproducible=True, carried=carried, unfinished=True, steps=2)
    trainer.fit()
    return trainer


def test_each_rank_s_memory(tmp_path: Path) -> None:
    """In GB; threads stand for processes here, so it is the same of all."""
    told: list[dict[str, Any]] = []

    def of(world: World) -> list[dict[str, Any]]:
        trainer = member_trainer(world, log_every=2, membership=None)
        trainer.observer.ranks = told.append  # type: ignore[method-assign]
        trainer.fit()
        return trainer.observer.training  # type: ignore[attr-defined, no-any-return]

    records, *_ = together(3, of)
    assert len(records) == len(told) > 2
    for record, ranks in zip(records, told, strict=True):
        assert len(ranks["peak_memory_gb"]) == 3
        assert record["peak_memory_gb"] == max(ranks["peak_memory_gb"])
        assert 0.05 < min(ranks["peak_memory_gb"]) < 100
