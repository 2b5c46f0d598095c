"""What the host has to know of sums is on its way for all of them before it waits for the first: it waits once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_lb.optim import SGD, DistributedOptimizer
from hvd_lb.training.batchnorm import ReproducibleStatistics
from hvd_lb.world.arriving import Arriving
from hvd_lb.world.solo import Solo


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to numbers on their way."""
    happened: list[str] = []
    begin, wait = Arriving.__init__, Arriving.wait

    def begun(arriving: Arriving[Any], numbers: Tensor, kind: Any) -> None:
        happened.append("begins")
        begin(arriving, numbers, kind)

    def waited(arriving: Arriving[Any]) -> list[Any]:
        happened.append("waits")
        return wait(arriving)

    monkeypatch.setattr(Arriving, "__init__", begun)
    monkeypatch.setattr(Arriving, "wait", waited)
    return happened


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 1))


def test_exact_sums_of_gradients_and_statistics(events: list[str]) -> None:
    model = network()
    opt = DistributedOptimizer(
        SGD(model.parameters()), model, world=Solo(), bucket_bytes=1, reproducible_terms=2
    )
    statistics = ReproducibleStatistics(model, Solo(), 2)
    for _ in range(2):
        events.clear()
        for last in (False, True):
            opt.backward(model(torch.randn(5, 3)).square().sum(), last=last)
            statistics.after_forward()
        statistics.start()
        opt.synchronize(images=10)
        statistics.synchronize()
        opt.step()
        statistics.step(2)
        sums = len(opt._buckets) + 1
        assert sums > 3
        assert events == ["begins"] * sums + ["waits"] * sums


def test_which_parameters_have_gradients_at_all(events: list[str]) -> None:
    model = network()
    opt = DistributedOptimizer(SGD(model.parameters()), model, world=Solo(), bucket_bytes=1)
    opt.backward(model[0](torch.randn(5, 3)).square().sum() + model[3](torch.randn(5, 4)).sum())
    opt.step(images=5)
    assert events == ["begins"] * (len(opt._buckets) - 4) + ["waits"] * (len(opt._buckets) - 4)
    assert len(opt._buckets) == len(list(model.parameters()))
