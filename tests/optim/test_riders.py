"""Integers that travel in the gradients' exchange: always there, once a step, whatever the gradients are."""

from __future__ import annotations

import pytest
import torch
from together import Together, together
from torch import nn

from hvd_lb.optim.distributed import DistributedOptimizer
from hvd_lb.optim.exchange.buckets import Riders
from hvd_lb.world import World
from hvd_lb.world.solo import Solo


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


class Said:
    """Riders of one process: (how often they were asked for, its rank + 1, a large number on rank 0)."""

    def __init__(self, world: World) -> None:
        self.times, self._rank = 0, world.rank
        self.riders = Riders(3, self._ask)

    def _ask(self) -> list[int]:
        self.times += 1
        return [self.times, self._rank + 1, 2**24 - 1 if self._rank == 0 else 0]


def carried(opt: DistributedOptimizer) -> list[int]:
    assert opt.carried
    return opt.carried.wait()


@pytest.mark.parametrize("terms", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_summed_once_a_step_however_little_is_learnt(terms: int | None, dtype: torch.dtype) -> None:
    def run(world: Together) -> list[list[int]]:
        model, said, found = network(dtype), Said(world), []
        first, second = model[0].parameters(), model[1].parameters()
        opt = DistributedOptimizer(
            torch.optim.SGD([{"params": first}, {"params": second, "lr": 0.2}], 0.1), model, world=world,
            bucket_bytes=32, reproducible_terms=terms, riders=said.riders,
        )  # fmt: skip
        x = torch.ones(2, 3, dtype=dtype)

        def step(*, backwards: int = 1, look: bool = False) -> None:
            for index in range(backwards):
                opt.backward(model(x).sum(), last=index == backwards - 1)
            if look:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            found.append(carried(opt))

        step()
        step(backwards=3)
        step(backwards=world.rank)  # none on the first process
        step(look=True)
        model[0].requires_grad_(False)  # where backward comes to last
        step()
        for p in model.parameters():
            p.requires_grad_(False)
        step(backwards=0)
        model.requires_grad_(True)
        opt.backward(model(x).sum())
        opt.zero_grad()  # the exchange was under way
        found.append(carried(opt))
        step()
        assert said.times == len(found)
        return found

    expected = [[3 * step, 6, 2**24 - 1] for step in range(1, 9)]
    assert together(3, run) == [expected] * 3


@pytest.mark.parametrize("world", [Solo(), None], ids=["alone", "together"])
def test_they_travel_without_any_parameter_to_learn(world: Solo | None) -> None:
    """And, by the way, when one is unfrozen that had no place before."""

    def run(world: World) -> list[list[int]]:
        model, said = network().requires_grad_(False), Said(world)
        opt = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model, world=world, riders=said.riders
        )
        opt.step()
        found = [carried(opt)]
        model[1].requires_grad_(True)
        for _ in range(2):
            opt.step()
            found.append(carried(opt))
        return found

    if world:
        assert run(world) == [[step, 1, 2**24 - 1] for step in (1, 2, 3)]
    else:
        assert together(2, run) == [[[2 * step, 3, 2**24 - 1] for step in (1, 2, 3)]] * 2


def test_processes_that_say_different_things_are_told() -> None:
    def run(world: World) -> None:
        riders = Riders(1 + world.rank, lambda: [0] * (1 + world.rank))
        DistributedOptimizer(torch.optim.SGD(network().parameters(), 0.1), world=world, riders=riders)

    with pytest.raises(RuntimeError, match="disagree on the parameters|not all 2 processes"):
        together(2, run)
