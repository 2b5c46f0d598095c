"""A parameter belongs to one DistributedOptimizer: an older one that shares it says so instead of using wrong sums."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hvd_lb.optim import DistributedOptimizer
from hvd_lb.world.solo import Solo


def made(*modules: nn.Module) -> DistributedOptimizer:
    model = nn.ModuleList(modules)
    return DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=Solo())


def loss_of(*modules: nn.Module) -> torch.Tensor:
    return nn.Sequential(*modules)(torch.ones(2, 3)).square().sum()


USES: dict[str, Callable] = {
    "backward": lambda opt, loss: opt.backward(loss),
    "step": lambda opt, loss: (loss.backward(), opt.step()),
    "synchronize": lambda opt, loss: (loss.backward(), opt.synchronize(images=2)),
    "a closure": lambda opt, loss: opt.step(lambda: loss),
    "a new group": lambda opt, loss: opt.add_param_group({"params": nn.Linear(3, 3).parameters()}),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_older_of_two_is_an_error(use: Callable) -> None:
    encoder, actor, critic = (nn.Linear(3, 3) for _ in range(3))
    old, new = made(encoder, actor), made(encoder, critic)
    before = encoder.weight.clone()
    with pytest.raises(RuntimeError, match=r"^0\.(weight|bias) belongs to another DistributedOptimizer"):
        use(old, loss_of(encoder, actor))
    assert torch.equal(encoder.weight, before)
    old.zero_grad()
    new.backward(loss_of(encoder, critic))
    new.step(images=2)
    assert not torch.equal(encoder.weight, before)


def test_one_that_was_replaced_is_left_alone() -> None:
    """Also where the newer one's loss goes through parameters that only the older one has."""
    encoder, actor = nn.Linear(3, 3), nn.Linear(3, 3)
    old, new = made(encoder, actor), made(encoder)
    for _ in range(3):
        new.backward(loss_of(encoder, actor))
        new.step(images=2)
    assert (old.steps, new.steps) == (0, 3)


def test_one_that_is_gone_takes_nothing_along() -> None:
    model = nn.Linear(3, 3)
    for _ in range(3):
        opt = made(model)
        gc.collect()
        opt.backward(loss_of(model))
        opt.step(images=2)
    assert opt.steps == 1


@pytest.mark.parametrize("terms", [None, 2])
def test_what_a_step_of_the_older_one_has_left_counts_no_more(terms: int | None) -> None:
    model = nn.Linear(3, 3)
    old = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=Solo())
    old.backward(loss_of(model))
    old.step(images=2)
    assert model.weight.grad.any()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    new = DistributedOptimizer(sgd, model, world=Solo(), reproducible_terms=terms)
    new.backward(loss_of(model))
    new.synchronize(images=2)
    (expected,) = torch.autograd.grad(loss_of(model), [model.weight])
    assert torch.allclose(model.weight.grad, expected / 2)
    assert old.steps == 1


def test_apart_they_stay_fine() -> None:
    generator, critic = nn.Linear(3, 3), nn.Linear(3, 3)
    first, second = made(generator), made(critic)
    for _ in range(2):
        first.backward(loss_of(generator, critic))
        first.step(images=2)
        second.zero_grad()
        second.backward(loss_of(critic))
        second.step(images=2)
    assert first.steps == second.steps == 2
