"""A microbatch in parts, by the run's own network, optimizer and loader; and the command that foretells with them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_lb.forecast.measured import measure_compute, measure_loading
from hvd_lb.forecast.pages import read_forecast
from hvd_lb.forecast.profile import load_device
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.resolve import resolve
from hvd_lb.simulate import _trainer
from hvd_lb.training.trainer import Trainer

Run = Callable[..., Any]


def trainer(**options: Any) -> Trainer:
    fields = {"data": "digits", "gpus": 4, "per_gpu_batch": 8, "epochs": 1, **options}
    return _trainer(resolve(fields, recipe=None, default_gpus=1), torch.device("cpu"), 1, SilentObserver())


@pytest.mark.parametrize("reproducible", [False, True])
def test_parts_of_a_microbatch(reproducible: bool) -> None:
    run = trainer(reproducible=reproducible)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    found = measure_compute(run, 8, time.monotonic())
    compute = found.compute
    assert found.microbatches >= 3
    assert min(compute.forward, compute.backward, compute.update) > 0
    after = [bucket.after for bucket in compute.buckets]
    assert after == sorted(after)  # backward fills them in this order
    assert 0 < after[0] <= after[-1] <= compute.backward
    gradients = sum(p.numel() for p in run.model.parameters())
    # Sums in fixed point have 64 bits. A flag for each parameter travels along, and paddings.
    parameters = len(list(run.model.parameters()))
    sent = sum(bucket.size for bucket in compute.buckets) - (8 if reproducible else 4) * gradients
    assert 4 * parameters <= sent < 64 * parameters
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=f"{name} of the run was changed")
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_fewer_images_are_taken_for_a_part() -> None:
    found = measure_compute(trainer(), 2, time.monotonic())
    assert (found.images, found.compute.images) == (2, 8)


def test_the_loader_s_own_speed() -> None:
    assert (measure_loading(trainer(), time.monotonic() + 0.2) or 0) > 0


def test_simulate_foretells_and_keeps_it(hvd_lb: Run, tmp_path: Path) -> None:
    said = hvd_lb(
        *("simulate", "--data", "digits", "--device", "cpu", "--gpus", 64, "--per-gpu-batch", 4),
        *(
            "--budget",
            "2s",
            "--cluster",
            "dgx-h100",
            "--price-per-gpu-hour",
            2,
            "--output",
            tmp_path / "there",
        ),
    )
    assert said.status == 0, said.err
    topics = [line.partition(":")[0] for line in said.out.splitlines()]
    for topic in (
        "a step",
        "efficiency",
        "what limits",
        "loading",
        "memory",
        "failures",
        "price",
        "recommended",
    ):
        assert topic in topics
    forecast = read_forecast(tmp_path / "there" / "forecast.json")
    assert (forecast.gpus, forecast.cluster) == (64, "dgx-h100")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        *("device.yaml", "forecast.html", "forecast.json", "forecast.png", "step-trace.json")
    ]
    device = load_device(str(tmp_path / "there" / "device.yaml"))
    assert (device.model, device.per_gpu_batch) == (forecast.model, 4)
    assert json.loads((tmp_path / "there" / "step-trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cluster", "big-basi"), "did you mean 'big-basin'?"),
        (("--cluster", "big-basin", "--device-profile", "h10"), "did you mean 'h100'?"),
        (("--cluster", "big-basin", "--device-profile", "p100"), "was measured with --model resnet50"),
        (("--cluster", "big-basin", "--output", __file__), "is a file: expected a folder"),
        (("--device-profile", "p100"), "is for a forecast: add --cluster"),
        (("--cluster", "big-basin", "--price-per-gpu-hour", "nan"), "is not in the range"),
        (("--cluster", "big-basin", "--gpus", "0"), "--gpus 0"),
    ],
)
def test_bad_input_is_one_line(
    hvd_lb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = hvd_lb("simulate", "--data", "digits", "--device", "cpu", "--budget", "1s", *words)
    assert said.status == 2
    assert message in said.err
    assert (said.err.count("\n"), said.out, list(tmp_path.iterdir())) == (1, "", [])
