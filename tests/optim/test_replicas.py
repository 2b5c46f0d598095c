"""Weights that are no longer the same on all processes are an error, whatever has parted them; rounding is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from together import Together, together
from torch import nn

from hvd_lb.optim.distributed import DistributedOptimizer
from hvd_lb.optim.exchange.replicas import Replicas

Change = Callable[[nn.Module, int], None]
TOLD = "weights are no longer the same on all processes, as those of .* tell"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(
    processes: int, change: Change, steps: int = 40, dtype: torch.dtype = torch.float32, **options: Any
) -> list[str]:
    """What each process is told, "" if nothing, where `change` is done after the third step."""
    if options.get("reproducible_terms") == "as many":
        options["reproducible_terms"] = processes

    def run(world: Together) -> str:
        model = network().to(dtype)
        opt = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1, 0.9), model, world=world, **options
        )
        try:
            for step in range(steps):
                x = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + world.rank)).to(
                    dtype
                )
                model(x).square().mean().backward()
                if step >= 3:
                    change(model, step if world.rank else -step)
                opt.step()
        except RuntimeError as error:
            return str(error)
        return ""

    return together(processes, run)


@torch.no_grad()
def loads_on_rank_0(model: nn.Module, step: int) -> None:
    if step == -3:
        torch.manual_seed(7)
        model.load_state_dict({name: torch.randn_like(of) for name, of in model.state_dict().items()})


@torch.no_grad()
def makes_its_head_anew(model: nn.Module, step: int) -> None:
    if abs(step) == 3:
        generator = torch.Generator().manual_seed(0 if step > 0 else 1)
        model[2].weight.copy_(torch.randn(3, 5, generator=generator))


def adds_noise_of_its_own(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in model.parameters():
        assert p.grad is not None
        p.grad += torch.randn(p.shape, generator=generator).to(p)


@torch.no_grad()
def rounds_otherwise(model: nn.Module, step: int) -> None:
    """As another kind of CPU may, in each step; in bf16 a bit less often."""
    if step < 0 and (model[0].weight.dtype != torch.bfloat16 or step % 20 == 0):
        for p in model.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps)


def nothing(model: nn.Module, step: int) -> None:
    pass


KINDS = [
    {},
    {"reproducible_terms": "as many"},
    {"reproducible_terms": 64},
    {"compress": "fp16"},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("change", [loads_on_rank_0, makes_its_head_anew, adds_noise_of_its_own])
def test_what_parts_them_is_told(change: Change, processes: int, options: dict[str, Any]) -> None:
    told = train(processes, change, **options)
    assert [message for message in told if message.startswith("weights are no longer the same")], told
    assert all(told)  # the others at least that one of them is gone


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("processes", [2, 3, 16])
@pytest.mark.parametrize("change", [nothing, rounds_otherwise])
def test_rounding_is_not_told(change: Change, processes: int, options: dict[str, Any]) -> None:
    assert train(processes, change, **options) == [""] * processes


@torch.no_grad()
def breaks(model: nn.Module, step: int) -> None:
    if abs(step) == 3:
        model[0].weight.fill_(torch.nan)
        model[2].weight.fill_(torch.inf)


def test_weights_that_are_no_numbers_are_the_same() -> None:
    assert train(3, breaks) == [""] * 3


def test_frozen_weights_of_the_model_are_among_them() -> None:
    def run(world: Together) -> None:
        model = network()
        model[0].requires_grad_(False)
        opt = DistributedOptimizer(torch.optim.SGD(model[2].parameters(), 0.1), model, world=world)
        if world.rank == 0:
            with torch.no_grad():
                model[0].weight += 1
        for _ in range(8):
            model(torch.ones(2, 6)).mean().backward()
            opt.step()

    with pytest.raises(RuntimeError, match=TOLD.replace(".*", "0.weight")):
        together(2, run)


def parted(weights: list[torch.Tensor], dtype: torch.dtype, steps: int = 100) -> list[bool]:
    """Whether each process is told after some step, with these weights, and riders of this dtype."""
    processes = [
        Replicas(torch.optim.SGD([of], 0.1), rank, len(weights), 5) for rank, of in enumerate(weights)
    ]
    found = [False] * len(weights)
    for step in range(steps):
        riders = [torch.zeros(Replicas.riders, dtype=dtype) for _ in weights]
        for process, of, own in zip(processes, weights, riders, strict=True):
            process.note(step, [of])
            process.say(own)
        for rank, process in enumerate(processes):
            process.hear(torch.stack(riders).sum(0))
            found[rank] |= process.parted(True, str) is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_all_elements_come_up(dtype: torch.dtype) -> None:
    for place in ((0, 0, 0, 0), (1, 2, 0, 1), (1, 0, 1, 0)):
        weights = [torch.ones(2, 3, 2, 2) for _ in range(3)]
        weights[1][place] = 3
        assert parted(weights, dtype, 400) == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_elements_are_the_same_however_they_lie_in_memory(dtype: torch.dtype) -> None:
    weights = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    others = [weights.contiguous(memory_format=torch.channels_last), weights.expand(2, 4, 3, 2, 2)[1]]
    assert not any(parted([weights, *others, weights.transpose(0, 3).contiguous().transpose(0, 3)], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_small_weights_and_zeros_are_no_difference(dtype: torch.dtype) -> None:
    """Also where what is small beside the others is another number for each."""
    weights = [torch.tensor([1.0, 2.0, 1e-9 * rank, -1e-8 * rank]) for rank in range(4)]
    assert not any(parted(weights, dtype))
    for size in (0.0, 5e-10, 1e-12):
        assert not any(parted([torch.full((4,), size)] * 4, dtype))


def test_two_alike_that_differ_from_the_others_are_found() -> None:
    """As the first ranks of two hosts, which have loaded the same file."""

    def run(world: Together) -> None:
        model = network()
        opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
        if world.rank % 4 == 0:
            with torch.no_grad():
                for p in model.parameters():
                    p += 1
        for _ in range(8):
            model(torch.ones(2, 6)).mean().backward()
            opt.step()

    with pytest.raises(RuntimeError, match=TOLD):
        together(8, run)


def test_weights_may_differ_within_a_step() -> None:
    """As where each process looks for a sharp place of its own (m-sharpness), and goes back before the update."""

    def run(world: Together) -> str:
        model = network()
        opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
        for _ in range(12):
            with torch.no_grad():
                before = [p.clone() for p in model.parameters()]
                for p in model.parameters():
                    p += 1 + world.rank
            model(torch.ones(2, 6)).mean().backward()
            with torch.no_grad():
                for p, of in zip(model.parameters(), before, strict=True):
                    p.copy_(of)
            opt.step()
        return "done"

    assert together(3, run) == ["done"] * 3
