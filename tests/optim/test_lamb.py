"""LAMB against its formula, number by number in plain Python, and without trust ratios against torch's Adam."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hvd_lb.optim.lamb import LAMB
from hvd_lb.optim.make import make_optimizer
from hvd_lb.recipe import Recipe

RATES = (0.5, 0.02, 0.0, 0.3)
BETAS, EPSILON = (0.8, 0.95), 1e-3


def gradients(step: int, shapes: list[torch.Size]) -> list[torch.Tensor]:
    torch.manual_seed(step)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("decay", [0.0, 5e-2])
def test_the_papers_algorithm(decay: float) -> None:
    torch.manual_seed(9)
    start = [torch.randn(7, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    weights = [nn.Parameter(of.clone()) for of in start]
    ours = LAMB(weights, betas=BETAS, eps=EPSILON, weight_decay=decay)
    plain = [(of.flatten().tolist(), [0.0] * of.numel(), [0.0] * of.numel()) for of in start]
    for t, rate in enumerate(RATES, start=1):
        grads = gradients(t, [of.shape for of in start])
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        ours.param_groups[0]["lr"] = rate
        ours.step()
        for (w, m, v), grad in zip(plain, grads, strict=True):
            r = []
            for i, g in enumerate(grad.flatten().tolist()):
                m[i] = 0.8 * m[i] + 0.2 * g
                v[i] = 0.95 * v[i] + 0.05 * g * g
                r.append(m[i] / (1 - 0.8**t) / (math.sqrt(v[i] / (1 - 0.95**t)) + EPSILON) + decay * w[i])
            ratio = math.hypot(*w) / math.hypot(*r)
            w[:] = [of - rate * ratio * step for of, step in zip(w, r, strict=True)]
    for weight, (w, _, _) in zip(weights, plain, strict=True):
        expected = torch.tensor(w, dtype=torch.float64)
        torch.testing.assert_close(weight.detach().flatten(), expected, rtol=1e-12, atol=1e-14)


def test_without_trust_ratios_it_is_adam() -> None:
    found = []
    for kind, more in ((LAMB, {"trust": False}), (torch.optim.Adam, {})):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(6, dtype=torch.float64))
        optimizer = kind([weight], lr=0.1, betas=BETAS, eps=EPSILON, **more)
        for step in range(5):
            weight.grad = gradients(step, [weight.shape])[0]
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_nothing_to_trust_is_a_ratio_of_1() -> None:
    for start, grad in ((0.0, 1.0), (2.0, 0.0)):
        found = []
        for trust in (True, False):
            weight = nn.Parameter(torch.full((4,), start, dtype=torch.float64))
            weight.grad = torch.full_like(weight, grad)
            LAMB([weight], lr=0.1, trust=trust).step()
            found.append(weight.detach())
        assert torch.equal(*found)


def test_a_recipe_leaves_batch_norm_without_ratio_and_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    recipe = Recipe(optimizer="lamb", momentum=0.8, beta2=0.99, epsilon=1e-5, weight_decay=0.01)
    optimizer = make_optimizer(recipe, model, 0.1)
    assert isinstance(optimizer, LAMB)
    assert [(group["trust"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (True, 0.01), (False, 0.0),
    ]  # fmt: skip
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (0.1, (0.8, 0.99), 1e-5)
    }


def test_states_go_on_and_copies_are_alike() -> None:
    weight = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = LAMB([weight], lr=0.3)
    weight.grad = torch.randn(6, dtype=torch.float64)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    other = nn.Parameter(weight.detach().clone())
    loaded = LAMB([other], lr=0.3)
    loaded.load_state_dict(optimizer.state_dict())
    grad = torch.randn(6, dtype=torch.float64)
    for one in (optimizer, twin, loaded):
        (parameter,) = one.param_groups[0]["params"]
        parameter.grad = grad.clone()
        one.step()
    assert torch.equal(weight, other)
    assert torch.equal(weight, twin.param_groups[0]["params"][0])


@pytest.mark.parametrize(
    ("option", "value"), [("lr", -1.0), ("eps", -1.0), ("weight_decay", -0.1), ("betas", (1, 0))]
)
def test_numbers_out_of_range(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"LAMB was given {option}"):
        LAMB([nn.Parameter(torch.ones(1))], **{option: value})  # type: ignore[arg-type]
