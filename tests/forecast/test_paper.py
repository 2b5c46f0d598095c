"""The models beside what the paper says of communication and speed (sections 4 and 5.5); the table of docs/forecast.md.

One number is fitted, the latency of a step: halving/doubling is 3 times as fast as the ring on 32 servers. It is not
fitted again. What the exchange does not explain is told apart: see the last two tests.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from torch import nn

from hvd_lb.forecast.collectives import ALGORITHMS, Hierarchy
from hvd_lb.forecast.profile import load_cluster, load_device
from hvd_lb.forecast.step import Compute, Filled, StepTimes, simulate_step, slowest_of

PAPER_BACKWARD = 0.120
GROWTH_352, EFFICIENCY_256 = 0.12, 0.90


@pytest.fixture(scope="module")
def gradients() -> list[Filled]:
    """ResNet-50's gradients, one allreduce each as in the paper, backward in proportion to its work."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    work: dict[nn.Module, int] = {}

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        weights = 0 if isinstance(module, nn.BatchNorm2d) else next(module.parameters()).numel()
        work[module] = weights * (output[0, 0].numel() if output.dim() == 4 else 1)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    done = itertools.accumulate(work[module] for module in reversed(work))
    return [
        Filled(4 * parameter.numel(), PAPER_BACKWARD * seconds / sum(work.values()))
        for module, seconds in zip(reversed(work), done, strict=True)
        for parameter in module.parameters()
    ]


@pytest.fixture(scope="module")
def model() -> Hierarchy:
    return load_cluster("big-basin").hierarchy()


def between_servers(model: Hierarchy, gradients: list[Filled], algorithm: str, servers: int) -> float:
    return sum(ALGORITHMS[algorithm](servers, gradient.size).seconds(model.between) for gradient in gradients)


def step(model: Hierarchy, gradients: list[Filled], algorithm: str, gpus: int) -> StepTimes:
    device = load_device("p100")
    forward = device.microbatch_ms / 1000 - PAPER_BACKWARD
    compute = Compute(forward, PAPER_BACKWARD, 0.0, tuple(gradients), 32)
    return simulate_step(compute, 1, lambda size: model.seconds(algorithm, gpus, size))


def test_resnet_50_has_100_megabytes(gradients: list[Filled]) -> None:
    assert len(gradients) == 161
    assert sum(gradient.size for gradient in gradients) == pytest.approx(100e6, rel=0.03)


def test_peak_bandwidth_need(gradients: list[Filled]) -> None:
    """Section 4: 200 MB within backward's time are 12.8 Gbit/s; of the line, 15 with overhead."""
    twice = 2 * 100e6 * 8 / 0.125
    assert twice == pytest.approx(12.8e9)
    sent = ALGORITHMS["ring"](10**6, sum(gradient.size for gradient in gradients)).sent * 8 / 0.125
    assert sent == pytest.approx(12.8e9, rel=0.03)
    assert 12.8 / load_cluster("big-basin").between.efficiency == pytest.approx(15, rel=1e-3)


def test_the_latency_is_fitted_to_three_times_the_ring(model: Hierarchy, gradients: list[Filled]) -> None:
    ring, halving = (between_servers(model, gradients, name, 32) for name in ("ring", "halving-doubling"))
    assert ring / halving == pytest.approx(3, rel=0.005)


def test_halving_doubling_wins_clearly_up_to_a_million_elements(model: Hierarchy) -> None:
    def ratio(elements: float) -> float:
        ring, halving = (
            ALGORITHMS[name](32, 4 * elements).seconds(model.between) for name in ("ring", "halving-doubling")
        )
        return ring / halving

    assert ratio(1e3) > 5
    assert ratio(1e5) > 2
    assert ratio(1e6) > 1.3
    assert 1 < ratio(1e8) < 1.05


def test_the_exchange_is_hidden_behind_backward(model: Hierarchy, gradients: list[Filled]) -> None:
    """As section 4 concludes. So the exchange does not explain the 12 %: with one number we are 12 points off."""
    one, largest = (step(model, gradients, "halving-doubling", gpus) for gpus in (8, 352))
    assert largest.network < PAPER_BACKWARD
    growth = largest.seconds / one.seconds - 1
    assert 0 < growth < 0.005
    assert growth == pytest.approx(GROWTH_352, abs=0.12)
    efficiency = one.seconds / step(model, gradients, "halving-doubling", 256).seconds
    assert efficiency == pytest.approx(EFFICIENCY_256, abs=0.10)
    # The ring, which they left, would not have been hidden.
    assert step(model, gradients, "ring", 256).seconds / one.seconds > 1.25


def test_waiting_for_the_slowest_gpu_explains_the_rest(model: Hierarchy, gradients: list[Filled]) -> None:
    """With a second number, how unlike GPUs are, fitted to 29 hours on 8 GPUs and 1 hour on 256, 352 are foretold."""
    device = load_device("p100")
    assert device.spread is not None

    def seconds(gpus: int) -> float:
        late = device.spread * slowest_of(gpus) * device.microbatch_ms / 1000
        return step(model, gradients, "halving-doubling", gpus).seconds + late

    assert seconds(8) == pytest.approx(29 * 3600 / (90 * 1281167 / 256), rel=0.005)
    assert seconds(8) / seconds(256) == pytest.approx(29 / 32, abs=0.005)
    assert seconds(352) / seconds(8) - 1 == pytest.approx(GROWTH_352, abs=0.015)
