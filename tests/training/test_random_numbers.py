"""What the network draws (dropout): each virtual worker its own, a function of seed, step and worker, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_trainer, run_steps, small_data, small_recipe
from torch import Tensor, nn

from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Done, Solo

Masks = dict[tuple[int, int], tuple[bool, ...]]


@dataclass
class AmongCopies(Solo):
    """One of `size` processes of which the others have the very same tensors: enough to see what one of them draws."""

    rank: int = 0
    size: int = 1

    def allreduce_async(self, tensor: Tensor, name: str) -> Done:
        return Done(tensor.mul_(self.size))

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return tensor.mul_(self.size)


class Drawing(nn.Module):
    """A network that notes down what its dropout lets through, once a forward."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.drawn: list[tuple[bool, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(tuple((nn.functional.dropout(torch.ones(64), 0.5) > 0).tolist()))
        return self.inside(x)


def masks(recipe: Recipe, steps: int, rank: int = 0, size: int = 1, **more: Any) -> Masks:
    """By step and virtual worker, those of one process."""
    trainer = Trainer(
        recipe.model_copy(update={"together": 1}),  # together they draw within modules: test_together.py
        small_data(), AmongCopies(rank, size), device=torch.device("cpu"), threads=1,
        observer=SilentObserver(), **more,
    )  # fmt: skip
    first, drawing = trainer.step, Drawing(trainer.forward.network)
    trainer.forward.network = drawing
    run_steps(trainer, steps)
    keys = [(step, worker) for step in range(first, first + steps) for worker in trainer.workers]
    return dict(zip(keys, drawing.drawn, strict=True))


def test_every_worker_draws_anew_in_every_step() -> None:
    drawn = masks(small_recipe(), 3)
    assert len(drawn) == len(set(drawn.values())) == 12


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.usefixtures("equal_copies")
def test_it_plays_no_part_which_process_hosts_the_worker(processes: int) -> None:
    alone = masks(small_recipe(), 3)
    shared: Masks = {}
    for rank in range(processes):
        torch.manual_seed(rank)
        shared |= masks(small_recipe(), 3, rank, processes)
    assert shared == alone


def test_another_seed_draws_others() -> None:
    assert not set(masks(small_recipe(), 2).values()) & set(masks(small_recipe(seed=1), 2).values())


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole = masks(small_recipe(), 4)
    make_trainer(small_recipe(steps=2), store=CheckpointStore(tmp_path)).fit()
    goes_on = masks(small_recipe(), 2, checkpoint=open_checkpoint(tmp_path / "last"))
    assert goes_on == {key: drawn for key, drawn in whole.items() if key[0] >= 2}


def test_a_recomputation_draws_for_each_of_its_microbatches() -> None:
    """Others in every recomputation, and whichever process has the microbatch."""
    recipe = small_recipe(recompute_bn=45)
    drawn: dict[tuple[int, int], list[tuple[bool, ...]]] = {}
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        trainer = Trainer(
            recipe, small_data(), AmongCopies(rank, size), device=torch.device("cpu"), threads=1,
            observer=SilentObserver(),
        )  # fmt: skip
        for step in (4, 8):
            trainer.state.step = step
            trainer.forward.network = drawing = Drawing(trainer.model.train())
            trainer._recompute_statistics()
            drawn.setdefault((size, step), []).extend(drawing.drawn)
    assert drawn[1, 4] == drawn[2, 4]
    assert drawn[1, 8] == drawn[2, 8]
    assert len({*drawn[1, 4], *drawn[1, 8]}) == 12
