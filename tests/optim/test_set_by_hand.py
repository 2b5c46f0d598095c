"""Gradients and attributes that are set by hand: the numbers of torch itself, and nothing left out in silence."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from together import Together, together
from torch import Tensor, nn

from hvd_lb.optim import SGD, DistributedOptimizer
from hvd_lb.world.solo import Solo

Given = Callable[[list[nn.Parameter], list[Tensor]], None]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def images(step: int, rank: int, of: int) -> Tensor:
    drawn = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return drawn.chunk(of)[rank]


def by_data(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """As master weights get theirs."""
    for p, gradient in zip(parameters, gradients, strict=True):
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.data.copy_(gradient)


def in_place(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        p.grad.add_(gradient)


def into_views() -> Given:
    """`p.grad` are views of one tensor, once and for all."""
    flat: list[Tensor] = []

    def give(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        if not flat:
            flat.append(torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype))
            for p, view in zip(parameters, flat[0].split([p.numel() for p in parameters]), strict=True):
                p.grad = view.view_as(p)
        flat[0].copy_(torch.cat([gradient.flatten() for gradient in gradients]))

    return give


WAYS = {"data": lambda: by_data, "in place": lambda: in_place, "views": into_views}


def train(model: nn.Module, give: Given, world: Together | None, terms: int | None = None) -> list[Tensor]:
    """With every third step's gradients by a backward, which replaces what was set by hand."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    parameters = list(model.parameters())
    opt = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    if world:
        opt = DistributedOptimizer(opt, model, world=world, reproducible_terms=terms)
    for step in range(6):
        loss = model(images(step, rank, size).to(parameters[0].dtype)).square().mean()
        if step == 2:
            opt.zero_grad()
            loss.backward()
            opt.step()
            opt.zero_grad()
        else:
            give(parameters, list(torch.autograd.grad(loss, parameters)))
            opt.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("terms", [None, 2])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", ["data", "in place", "views"])
def test_they_are_used_whichever_way_they_are_set(way: str, size: int, terms: int | None) -> None:
    model = network()
    give = WAYS[way] if way != "views" else into_views
    expected = train(copy.deepcopy(model), give(), None)
    ranks = together(size, lambda world: train(copy.deepcopy(model), give(), world, terms))
    for weights in ranks:
        for a, b in zip(weights, expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_in_half_precision() -> None:
    model = network(torch.bfloat16)
    expected = train(copy.deepcopy(model), by_data, None)
    (weights,) = together(1, lambda world: train(copy.deepcopy(model), by_data, world))
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_they_stay_until_they_are_cleared_and_a_backward_replaces_them() -> None:
    w = nn.Parameter(torch.zeros(3))
    opt = DistributedOptimizer(torch.optim.SGD([w], 1.0), world=Solo())
    w.grad = given = torch.ones(3)
    opt.step()
    opt.step()  # as torch does
    assert w.tolist() == [-2.0] * 3
    assert w.grad is given
    (2 * w).sum().backward()
    opt.step()
    assert w.tolist() == [-4.0] * 3
    assert given.tolist() == [1.0] * 3
    opt.zero_grad()
    opt.step()
    assert w.tolist() == [-4.0] * 3


def test_what_is_written_onto_the_gradient_of_a_backward_in_secret_is_an_error() -> None:
    w = nn.Parameter(torch.zeros(3))
    opt = DistributedOptimizer(torch.optim.SGD([w], 1.0), world=Solo())
    w.sum().backward()
    opt.step()
    w.grad.data.fill_(5.0)
    with pytest.raises(RuntimeError, match=r"without a backward on any process.*p.grad.data"):
        opt.step()


def frozen(world: Together) -> nn.Module:
    """As of an estimate that needs no backward."""
    model = network().requires_grad_(False)
    opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
    model[2].bias.grad = torch.full((2,), 1.0 + world.rank, dtype=torch.float64)
    opt.step()
    return model


def after_a_backward(world: Together) -> nn.Module:
    """Of another part of the network."""
    model = network()
    opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
    model(images(0, world.rank, world.size)).sum().backward(inputs=list(model[0].parameters()))
    for p in model[2].parameters():
        p.grad = torch.full_like(p, 1.0 + world.rank)
    opt.step()
    return model


@pytest.mark.parametrize(
    ("loop", "words"), [(frozen, "2.bias, which is not exchanged"), (after_a_backward, "after the exchange")]
)
def test_one_that_would_be_used_without_those_of_the_others_is_an_error(
    loop: Callable[[Together], nn.Module], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        together(2, loop)
    together(1, loop)


def test_zeros_may_be_filled_in_where_there_is_none() -> None:
    def train(world: Together) -> Tensor:
        model = network()
        opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
        model(images(0, world.rank, world.size)).sum().backward(inputs=[model[0].weight])
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        opt.step()
        return model[0].weight.detach()

    one, other = together(2, train)
    assert torch.equal(one, other)


def test_attributes_of_the_wrapped_optimizer_are_set_there() -> None:
    class Scaling(torch.optim.SGD):
        factor = 1.0

        def step(self, closure: object = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(self.factor)
            super().step()

    w = nn.Parameter(torch.zeros(1))
    opt = DistributedOptimizer(Scaling([w], 1.0, momentum=0.9), world=Solo())
    opt.factor = 0.5
    w.sum().backward()
    opt.step()
    assert w.item() == -0.5
    assert opt.optimizer.factor == opt.factor == 0.5
    opt.state = defaultdict(dict)  # how people begin anew
    assert opt.optimizer.state is opt.state
    opt.zero_grad()
    w.sum().backward()
    opt.step()
    assert w.item() == -1.0
    opt.steps = 7
    assert not hasattr(opt.optimizer, "steps")


def clipping(ranks: set[int], world: Together) -> str:
    model = network()
    opt = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world)
    try:
        for step in range(4):
            model(images(step, world.rank, world.size)).square().mean().backward()
            if world.rank in ranks:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            opt.step()
            opt.zero_grad()
    except RuntimeError as error:
        return f"step {step}: {error}"
    return "".join(f"{p.sum().item():.9f}" for p in model.parameters())


def test_clipping_that_some_processes_leave_out_is_an_error_of_all() -> None:
    for ranks in ({0}, {1, 2}):
        told = together(3, lambda world, ranks=ranks: clipping(ranks, world))
        assert len(set(told)) == 1
        assert f"step 1: {len(ranks)} of 3 processes have changed gradients" in told[0]


def test_clipping_by_all_or_none_is_none() -> None:
    for ranks in (set(), {0, 1, 2}):
        told = together(3, lambda world, ranks=ranks: clipping(ranks, world))
        assert len(set(told)) == 1
        assert "changed" not in told[0]


def with_rates(rates: list[list[float]], world: Together, in_tensor: bool = False) -> str:
    """As of a scheduler that is given numbers of each process's own: `rates` by rank and step."""
    model = network()
    opt = DistributedOptimizer(torch.optim.AdamW(model.parameters(), 0.1), model, world=world)
    for step, rate in enumerate(rates[world.rank]):
        opt.param_groups[0]["lr"] = torch.tensor(rate) if in_tensor else rate
        try:
            model(images(step, world.rank, world.size)).square().mean().backward()
            opt.step()
        except RuntimeError as error:
            return f"step {step}: {error}"
    return "".join(f"{p.sum().item():.9f}" for p in model.parameters())


@pytest.mark.parametrize("in_tensor", [False, True])
def test_rates_that_differ_between_processes_are_an_error(in_tensor: bool) -> None:
    rates = [[0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.05, 0.05]]
    told = together(2, lambda world: with_rates(rates, world, in_tensor))
    assert [of.partition(" than")[0] for of in told] == [
        "step 3: processes have taken the last step() with other options of the optimizer"
    ] * 2
    assert "rank 1 (its lr: 0.05)" in told[1]


def test_rates_may_differ_by_rounding() -> None:
    """Another C library's cosine."""
    rates = [[0.1, 0.2, 0.3], [0.1, 0.2 * (1 + 3e-16), 0.3 * (1 - 3e-16)]]
    assert rates[0] != rates[1]
    assert not [of for of in together(2, lambda world: with_rates(rates, world)) if "options" in of]


def test_switches_that_torch_adds_where_a_state_is_loaded_do_not_count() -> None:
    def train(world: Together) -> list[float]:
        model = network()
        sgd = SGD(model.parameters())
        opt = DistributedOptimizer(sgd, model, world=world)
        if world.rank:  # whether torch does so or not
            sgd.defaults["differentiable"] = sgd.param_groups[0]["differentiable"] = False
        for step in range(3):
            model(images(step, world.rank, world.size)).square().mean().backward()
            opt.step()
        return [p.sum().item() for p in model.parameters()]

    first, second = together(2, train)
    assert first == second
