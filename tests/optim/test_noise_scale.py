"""The estimator on a problem whose noise scale is known, through the optimizer's own hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hvd_lb.optim.distributed import DistributedOptimizer
from hvd_lb.optim.noise_scale import NoiseEstimate, NoiseScale, quotient
from hvd_lb.optim.sgd import SGD
from hvd_lb.world.solo import Solo

DIMENSIONS, IMAGES, WORKERS, STEPS = 50, 4, 8, 60


class Plane(nn.Module):
    """Its loss for x is w · x: the gradient of an image is x itself, drawn around `mean` with variance 1 each."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(DIMENSIONS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w).sum()


def estimate(seed: int, *, reproducible: bool = False, mean: float = 0.3) -> NoiseEstimate:
    generator = torch.Generator().manual_seed(seed)
    model, noise = Plane(), NoiseScale()
    terms = WORKERS if reproducible else None
    optimizer = DistributedOptimizer(
        SGD(model.parameters(), lr=0.1), model, world=Solo(), reproducible_terms=terms
    )
    for _ in range(STEPS):
        own = None
        for worker in range(WORKERS):
            images = torch.randn(IMAGES, DIMENSIONS, generator=generator) + mean
            if worker == 0:
                optimizer.watch_norm()
            optimizer.backward(model(images), last=worker == WORKERS - 1)
            if worker == 0:
                own = optimizer.own_norm()
        optimizer.synchronize(global_images=IMAGES * WORKERS)
        assert own is not None
        noise.add(own, IMAGES, optimizer.sum_norm(), IMAGES * WORKERS)
        optimizer.step()
        optimizer.zero_grad()
    found = noise.estimate()
    assert found is not None
    return found


TRUE = 1 / 0.3**2  # tr Σ / |G|² = d / (d mean²)


@pytest.mark.parametrize("reproducible", [False, True])
def test_the_true_value_is_in_the_interval(reproducible: bool) -> None:
    found = estimate(1, reproducible=reproducible)
    assert found.value is not None
    assert found.high is not None
    assert found.low <= TRUE <= found.high
    assert found.value == pytest.approx(TRUE, rel=0.2)
    assert found.high - found.low < TRUE


def test_norms_are_those_of_the_gradients() -> None:
    model = Plane()
    optimizer = DistributedOptimizer(SGD(model.parameters(), lr=0.1), model, world=Solo())
    first, second = torch.randn(3, DIMENSIONS), torch.randn(3, DIMENSIONS)
    optimizer.watch_norm()
    optimizer.backward(model(first), last=False)
    optimizer.backward(model(second))  # no part of it
    own = optimizer.own_norm()
    assert own is not None
    assert own.item() == pytest.approx(first.sum(0).square().sum().item(), rel=1e-5)
    with pytest.raises(RuntimeError, match="after synchronize"):
        optimizer.sum_norm()
    optimizer.synchronize(global_images=6)
    expected = (first.sum(0) + second.sum(0)).square().sum().item()
    assert optimizer.sum_norm().item() == pytest.approx(expected, rel=1e-5)
    optimizer.step()


def test_a_parameter_without_a_gradient_leaves_no_norm() -> None:
    model = nn.ModuleList([Plane(), Plane()])
    optimizer = DistributedOptimizer(SGD(model.parameters(), lr=0.1), model, world=Solo())
    optimizer.watch_norm()
    optimizer.backward(model[0](torch.randn(3, DIMENSIONS)))
    assert optimizer.own_norm() is None
    assert optimizer.own_norm() is None


def test_intervals_hold_as_often_as_they_say() -> None:
    """Of normal pairs with correlation; 95 % of 400, give or take 3 standard deviations of 4.4."""
    chance = np.random.default_rng(1)
    true = 300.0
    held = 0
    for _ in range(400):
        parts = chance.multivariate_normal([true * 2, 2], [[90000, 60], [60, 1]], size=50)
        found = quotient([(float(s), float(g)) for s, g in parts])
        assert found.high is not None
        held += found.low <= true <= found.high
    assert 367 <= held <= 393


def test_a_gradient_that_is_lost_in_noise_has_no_upper_end() -> None:
    found = estimate(2, mean=0.0)
    assert (found.value, found.high) == (None, None)
    assert found.low > 50


def test_too_few_steps_and_steps_that_are_no_numbers_say_nothing() -> None:
    noise = NoiseScale()
    one = torch.ones(())
    for _ in range(9):
        noise.add(one, 1, one, 4)
        noise.add(one * torch.nan, 1, one, 4)
        noise.add(one, 4, one, 4)  # a step that is the first worker's alone
    assert noise.estimate() is None
    noise.add(one, 1, one, 4)
    assert noise.estimate() is not None


def test_the_interval_of_few_steps() -> None:
    """By Fieller's quadratic, with the unbiased variances of means: 1/6 and 1/24 here, and no covariance."""
    found = quotient([(11.0, 2.0), (9.0, 2.0), (10.0, 2.5), (10.0, 1.5)])
    a, b, c = 4 - 1.96**2 / 24, 20.0, 100 - 1.96**2 / 6
    ends = [(b + sign * (b * b - a * c) ** 0.5) / a for sign in (-1, 1)]
    assert found.value == pytest.approx(5)
    assert [found.low, found.high] == pytest.approx(ends, rel=1e-3)
