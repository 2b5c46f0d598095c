"""The trainer on each device: what a step computes, that the host does not wait for it, what is kept of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES, without_waiting
from test_trainer import largest_difference, make_trainer, reference, small_data, small_recipe
from together import together

from hvd_lb.data.loading.contract import Batch
from hvd_lb.exact.fixed_point import FixedPointOverflow, FixedPointSum
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("device", DEVICES)]


def ready_batches(trainer: Trainer, steps: int) -> Iterator[Batch]:
    """Those of so many steps, on the device already."""
    with trainer.batches() as batches:
        return iter([(x.clone(), y) for x, y in islice(batches, steps * len(trainer.workers))])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels_last": True, "momentum_form": 9},
        {"together": 2},
        {"together": 4, "channels_last": True},
    ],
)
def test_steps_are_those_of_a_plain_loop_and_nobody_waits(
    device: torch.device, changes: dict[str, Any]
) -> None:
    """In fp64: gradients of microbatches and groups, the update, batch norm's statistics."""
    trainer, steps = make_trainer(small_recipe(**changes), device=device), 4
    expected, ready = reference(trainer, steps), ready_batches(trainer, steps)
    trainer.model.train()
    with trainer.kernels():
        for _ in range(2):
            trainer.train_step(ready)  # makes what is kept, and records graphs
        with without_waiting(device):
            for _ in range(steps - 2):
                trainer.train_step(ready)
    trainer.state.statistics.publish(trainer.step)
    assert largest_difference(trainer.model, expected) < 1e-10


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_in_lower_precision_steps_are_near_those_in_fp64(device: torch.device, precision: str) -> None:
    def change(precision: str) -> torch.Tensor:
        trainer = make_trainer(small_recipe(precision=precision, channels_last=True), device=device)
        before = torch.cat([p.detach().flatten().double() for p in trainer.model.parameters()])
        ready = ready_batches(trainer, 2)
        trainer.model.train()
        with trainer.kernels():
            trainer.train_step(ready)
            after = torch.cat([p.detach().flatten().double() for p in trainer.model.parameters()])
            with without_waiting(device):
                trainer.train_step(ready)
        return after - before

    exact = change("fp64")
    most = {"fp32": 5e-4, "tf32": 3e-2, "bf16": 1e-1, "fp16": 3e-2}[precision]
    assert (change(precision) - exact).norm() < most * exact.norm()


def test_an_overflow_in_fp16_skips_a_step(device: torch.device) -> None:
    """The scale is halved, weights and velocities stay; the next step is taken again."""
    trainer = make_trainer(small_recipe(precision="fp16", gpus=2), device=device)
    ready = ready_batches(trainer, 3)

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()

    trainer.model.train()
    with trainer.kernels():
        seen = [weights()]
        for number in range(3):
            if number == 1:
                trainer.state.scaler.update(2.0**100)
            trainer.train_step(ready)
            if number == 1:
                assert trainer.state.scaler.get_scale() == 2.0**99
                trainer.state.scaler.update(2.0**10)
            seen.append(weights())
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)] == [False, True, False]
    assert bool(seen[-1].isfinite().all())


def test_a_sum_in_fixed_point_is_that_of_the_cpu_and_gathered_without_waiting(device: torch.device) -> None:
    torch.manual_seed(0)
    like = [torch.zeros(7, 3, 5, 5).to(memory_format=torch.channels_last), torch.zeros(1), torch.zeros(1001)]
    terms = [[torch.randn_like(of) * 10.0**number for of in like] for number in range(3)]
    sums = []
    for place in (device, torch.device("cpu")):
        gathered = FixedPointSum([of.to(place) for of in like], 3, "sum", Solo())
        there = [[of.to(place) for of in term] for term in terms]
        with without_waiting(place):
            for term in there:
                for index, of in enumerate(term):
                    gathered.add(index, of)
        gathered.start(Solo())
        found = [torch.empty_like(of, device=place) for of in like]
        assert gathered.finish(found) == ([3, 3, 3], [])
        sums.append([of.cpu() for of in found])
    assert all(map(torch.equal, *sums))


def test_reproducible_steps_have_the_same_bits_on_three_processes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = build_model("resnet8", 5, seed=0)  # threads share torch's random numbers
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))
    data, recipe = small_data(), small_recipe(precision="fp32", reproducible=True, steps=3)

    def run(world: World) -> list[torch.Tensor]:
        trainer = Trainer(recipe, data, world, device=device, threads=1, observer=SilentObserver())
        trainer.fit()
        return [tensor.cpu().clone() for tensor in trainer.model.state_dict().values()]

    alone = run(Solo())
    for found in together(3, run):
        assert all(map(torch.equal, found, alone))


def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(device: torch.device, tmp_path: Path) -> None:
    """And the checkpoint of one device is read on the other."""
    recipe = small_recipe(
        precision="fp32", reproducible=True, steps=4, checkpoint_every="2steps", channels_last=True
    )
    whole = make_trainer(recipe, device=device, store=CheckpointStore(tmp_path / "whole", keep=9))
    whole.fit()
    checkpoint = open_checkpoint(tmp_path / "whole" / "step-00000002")
    resumed = make_trainer(
        recipe, device=device, store=CheckpointStore(tmp_path / "resumed"), checkpoint=checkpoint
    )
    there = make_trainer(recipe, checkpoint=checkpoint)
    pairs = zip(there.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(of, other.cpu()) for of, other in pairs)
    resumed.fit()
    assert largest_difference(whole.model, resumed.model) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [tmp_path / run / "last" / name for run in ("whole", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_an_overflow_in_fixed_point_is_told_on_each_device(device: torch.device) -> None:
    trainer = make_trainer(small_recipe(precision="fp32", reproducible=True), device=device)
    ready = list(ready_batches(trainer, 2))
    trainer.model.train()
    with trainer.kernels():
        trainer.train_step(iter(ready[:4]))
        before = [p.detach().clone() for p in trainer.model.parameters()]
        with pytest.raises(FixedPointOverflow):
            trainer.train_step((1e6 * x, y) for x, y in ready[4:])
        assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_found_wherever_it_is(device: torch.device, bad: float) -> None:
    trainer = make_trainer(small_recipe(channels_last=True), device=device)
    ready = ready_batches(trainer, 1)
    trainer.model.train()
    with trainer.kernels():
        trainer.train_step(ready)
    state, weight = trainer.state, next(trainer.model.parameters())
    places = [weight.detach(), state.optimizer.state[weight]["velocity"], state.losses]
    for place in places:
        last = (*(size - 1 for size in place.shape),)
        kept = place[last].item()
        place[last] = bad
        assert not state.finite(state.losses)
        place[last] = kept
        assert state.finite(state.losses)
    places[0][0, 0, 0, 0] = 1e300  # of fp64, far beyond fp32
    assert state.finite(state.losses)
