"""A microbatch in parts, by the run's own network, optimizer and loader; and the command that foretells with them."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_lb.forecast.measured import measure_compute, measure_loading, standard_error
from hvd_lb.forecast.pages import read_forecast
from hvd_lb.forecast.profile import load_device
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.resolve import resolve
from hvd_lb.simulate import _trainer
from hvd_lb.training.trainer import Trainer

Run = Callable[..., Any]


def trainer(terms: int | None = None, **options: Any) -> Trainer:
    fields = {"data": "digits", "gpus": 1, "per_gpu_batch": 8, "epochs": 1000, **options}  # without end here
    resolved = resolve(fields, recipe=None, default_gpus=1)
    return _trainer(resolved, torch.device("cpu"), 1, SilentObserver(), terms)


@pytest.mark.parametrize(("reproducible", "terms", "size"), [(False, 256, 4), (True, 2, 4), (True, 256, 8)])
def test_parts_of_a_microbatch(reproducible: bool, terms: int, size: int) -> None:
    """Of a step of so many virtual workers, whose exact sums have `size` bytes for each parameter."""
    run = trainer(terms, reproducible=reproducible)
    began = time.monotonic()
    found = measure_compute(run, 8, began)
    seconds = time.monotonic() - began
    compute = found.compute
    assert run.step > found.microbatches >= 3
    assert min(compute.forward, compute.backward, compute.update) > 0
    assert found.microbatches * compute.seconds < seconds
    after = [bucket.after for bucket in compute.buckets]
    assert after == sorted(after)  # backward fills them in this order
    assert 0 < after[0] <= after[-1] <= compute.backward
    gradients = sum(p.numel() for p in run.model.parameters())
    # A flag for each parameter travels along, and paddings.
    parameters = len(list(run.model.parameters()))
    sent = sum(bucket.size for bucket in compute.buckets) - size * gradients
    assert 4 * parameters <= sent < 64 * parameters


def test_the_parts_are_all_of_a_step() -> None:
    """But for waiting for images: what a step does between forward and update, and beside them, takes time, too."""
    run = trainer(model="resnet20", per_gpu_batch=32)
    step, seconds = run.train_step, []

    def timed(batches: Any) -> None:
        began, waited = time.perf_counter(), batches.wait_seconds
        step(batches)
        seconds.append(time.perf_counter() - began - batches.wait_seconds + waited)

    run.train_step = timed  # type: ignore[method-assign]
    found = measure_compute(run, 32, time.monotonic() + 1)
    del seconds[: -found.microbatches]  # what warms up
    assert 0.9 < found.compute.seconds / statistics.fmean(seconds) < 1.1


def test_a_machine_that_is_slow_for_a_while_leaves_less_certainty() -> None:
    values = [0.1 + 0.001 * (number % 7) for number in range(160)]
    drifting = [value * (1 if number < 80 else 1.3) for number, value in enumerate(values)]
    shuffled = random.Random(0).sample(drifting, len(drifting))
    assert standard_error(values) < 0.01
    assert standard_error(drifting) > 2 * standard_error(shuffled) > 0.01
    assert standard_error(drifting[:3]) > 0  # too few for blocks


def test_fewer_images_stand_for_all() -> None:
    few, all_of_them = (
        measure_compute(trainer(per_gpu_batch=2), images, time.monotonic()) for images in (2, 8)
    )
    assert (few.images, few.compute.images) == (2, 2)
    assert (all_of_them.images, all_of_them.compute.images) == (2, 8)


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


def test_fewer_images_than_n_are_told(hvd_lb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 of 32 images, a small network's times are many times too long in proportion."""
    monkeypatch.setattr("hvd_lb.simulate._probe", lambda *_: 1.0)  # more than the budget
    words = ("simulate", "--data", "digits", "--device", "cpu", "--gpus", 2, "--budget", "1s")
    said = hvd_lb(*words, "--cluster", "dgx-h100")
    assert said.status == 0, said.err
    assert "of 2 of 32 images in parts" in said.out
    assert "note: times are those of 2 images, in proportion, and too long where" in said.out


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
