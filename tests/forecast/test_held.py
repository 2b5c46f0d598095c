from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.forecast.held import forecast_for, held_against
from hvd_lb.forecast.pages import write_forecast
from hvd_lb.forecast.predict import Device, Forecast, Run, predict
from hvd_lb.forecast.profile import load_cluster
from hvd_lb.forecast.step import Compute, Filled
from hvd_lb.recipe import Recipe


def forecast(**changes: Any) -> Forecast:
    run = Run(**{"model": "resnet8", "gpus": 2, "per_gpu_batch": 8, "steps_per_epoch": 10, "steps": 20,
                 "checkpoint_every": None, **changes})  # fmt: skip
    device = Device("mine", Compute(0.1, 0.2, 0.01, (Filled(1000, 0.2),), 8), 0.05)
    return predict(run, device, load_cluster("dgx-a100"))


def train(images_per_second: float | None, data_wait: float | None = 0.0) -> dict[str, Any]:
    return {"kind": "train", "step": 1, "images_per_second": images_per_second, "data_wait": data_wait}


def test_the_step_and_where_the_difference_lies() -> None:
    ranks = {"kind": "ranks", "step": 1, "data": [0.0, 0.0], "compute": [0.75, 0.6], "network": [0.25, 0.4]}
    # a step of 0.4 s, 0.1 of it the network's; the first record is that of starting up
    ((_, said),) = held_against(forecast(), [train(1.0), train(40.0), ranks, train(40.0)], 16)
    assert "and took 400 ms: +29 %, outside the interval" in said
    found = dict(re.findall(r"(computing|the network|waiting for images) ([+-]\d+) ms", said))
    share = forecast().share
    assert int(found["the network"]) == round(1000 * (0.1 - share.network))
    assert int(found["computing"]) == round(1000 * (0.3 - share.compute - share.slowest))
    assert int(found["waiting for images"]) == 0


def test_with_one_process_network_and_computing_are_not_told_apart() -> None:
    ((_, said),) = held_against(forecast(), [train(16 / 0.31, 0.1), train(None)], 16)
    assert "within the interval" in said
    assert re.search(r"computing and the network -3[12] ms, waiting for images \+31 ms", said)


@pytest.mark.parametrize("records", [[], [train(None)], [{"kind": "ranks", "data": 3}]])
def test_nothing_is_said_of_a_run_without_a_timed_step(records: list[dict[str, Any]]) -> None:
    assert held_against(forecast(), records, 16) == []


@pytest.mark.parametrize("field", ["data", "compute", "network"])
def test_records_that_are_none_are_left_out(field: str) -> None:
    broken = {"kind": "ranks", "data": [0.0], "compute": [1.0], "network": [0.0], field: "x"}
    ((_, said),) = held_against(forecast(), [train(16 / 0.31), broken], 16)
    assert "computing and the network" in said


def test_a_forecast_of_another_run_is_refused(tmp_path: Path) -> None:
    write_forecast(tmp_path, forecast(), [])
    path = tmp_path / "forecast.json"
    fields = {"model": "resnet8", "gpus": 2, "per_gpu_batch": 8}
    assert forecast_for(path, Recipe.model_validate(fields), 2) == forecast()
    for change, message in (
        ({"gpus": 4}, "--gpus 2, here 4"),
        ({"model": "resnet20"}, "--model resnet8, here"),
    ):
        with pytest.raises(UserError, match=message):
            forecast_for(path, Recipe.model_validate(fields | change), 2)
    with pytest.raises(UserError, match="this run has 1 processes"):
        forecast_for(path, Recipe.model_validate(fields), 1)


@pytest.mark.slow
def test_a_run_says_how_right_its_forecast_was(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--data", "digits", "--device", "cpu", "--gpus", 1, "--per-gpu-batch", 16)
    said = hvd_lb("simulate", *options, "--budget", "2s", "--cluster", "dgx-a100", "--output", tmp_path / "f")
    assert said.status == 0, said.err
    path = tmp_path / "f" / "forecast.json"
    words = ("--forecast", path, "--steps", 8, "--log-every", 2, "--output", tmp_path / "run")
    said = hvd_lb("train", *options, *words)
    assert said.status == 0, said.err
    assert re.search(r"forecast: a step was foretold to take .* and took .*: [+-]\d+ %", said.out)
    assert (tmp_path / "run" / "forecast.json").read_text() == path.read_text()
    found = (
        "train",
        *options,
        "--steps",
        2,
        "--output",
        tmp_path / "f",
    )  # beside the run, where simulate wrote it
    assert "forecast: a step was foretold" in hvd_lb(*found).out
    said = hvd_lb(
        "train", *options[:-1], 32, "--forecast", path, "--steps", 8, "--output", tmp_path / "other"
    )
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert not (tmp_path / "other").exists()
