"""LARS against its formula, tensor by tensor in plain Python."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hvd_lb.optim.lars import LARS
from hvd_lb.optim.make import make_optimizer
from hvd_lb.optim.sgd import SGD
from hvd_lb.recipe import Recipe

RATES = (0.5, 2.0, 2.0, 0.7)


def gradients(step: int, shapes: list[torch.Size]) -> list[torch.Tensor]:
    torch.manual_seed(step)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("decay", [0.0, 5e-2])
def test_the_papers_algorithm(decay: float) -> None:
    """v ← m v + γ λ (g + β w), w ← w − v."""
    torch.manual_seed(9)
    start = [torch.randn(7, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    weights = [nn.Parameter(of.clone()) for of in start]
    ours = LARS(weights, momentum=0.9, nesterov=False, weight_decay=decay, momentum_correction=False,
                trust_coefficient=0.02)  # fmt: skip
    plain = [(of.flatten().tolist(), [0.0] * of.numel()) for of in start]
    for step, rate in enumerate(RATES):
        grads = gradients(step, [of.shape for of in start])
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        ours.param_groups[0]["lr"] = rate
        ours.step()
        for (w, v), grad in zip(plain, grads, strict=True):
            g = grad.flatten().tolist()
            length, steep = math.hypot(*w), math.hypot(*g)
            ratio = 0.02 * length / (steep + decay * length)
            for i in range(len(w)):
                v[i] = 0.9 * v[i] + rate * ratio * (g[i] + decay * w[i])
                w[i] -= v[i]
    for weight, (w, _) in zip(weights, plain, strict=True):
        torch.testing.assert_close(
            weight.detach().flatten(), torch.tensor(w, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_nothing_to_trust_is_plain_sgd_and_so_is_a_group_without() -> None:
    """Weights or gradients that are all 0 have the ratio 1, and a coefficient of 0 leaves a group as it is."""
    for start, grad, trust in ((0.0, 1.0, 0.5), (2.0, 0.0, 0.5), (2.0, 1.0, 0.0)):
        found = []
        for kind in (LARS, SGD):
            weight = nn.Parameter(torch.full((4,), start, dtype=torch.float64))
            more = {"trust_coefficient": trust} if kind is LARS else {}
            optimizer = kind([{"params": [weight], **more}], lr=0.1, weight_decay=0.01)
            weight.grad = torch.full_like(weight, grad)
            optimizer.step()
            found.append(weight.detach())
        assert torch.equal(*found)


def test_a_recipe_leaves_batch_norm_to_plain_sgd() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    recipe = Recipe(optimizer="lars", trust_coefficient=0.02)
    optimizer = make_optimizer(recipe, model, 0.1)
    assert isinstance(optimizer, LARS)
    assert [group["trust_coefficient"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert not optimizer.fused


def test_states_go_on_and_copies_are_alike() -> None:
    weight = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = LARS([weight], lr=0.3, trust_coefficient=0.01)
    weight.grad = torch.randn(6, dtype=torch.float64)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    other = nn.Parameter(weight.detach().clone())
    loaded = LARS([other], lr=0.3)
    loaded.load_state_dict(optimizer.state_dict())
    grad = torch.randn(6, dtype=torch.float64)
    for one in (optimizer, twin, loaded):
        (parameter,) = one.param_groups[0]["params"]
        parameter.grad = grad.clone()
        one.step()
    assert torch.equal(weight, other)
    assert torch.equal(weight, twin.param_groups[0]["params"][0])


def test_a_coefficient_below_nothing() -> None:
    with pytest.raises(ValueError, match="trust_coefficient=-1"):
        LARS([nn.Parameter(torch.ones(1))], trust_coefficient=-1)
