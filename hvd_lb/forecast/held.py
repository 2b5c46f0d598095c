"""A forecast beside what happened: the step's time, and in which part of it the difference lies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.forecast.pages import read_forecast
from hvd_lb.forecast.predict import Forecast, Share
from hvd_lb.recipe import Recipe
from hvd_lb.report.text import duration


def forecast_for(path: Path, recipe: Recipe, processes: int) -> Forecast:
    """The forecast of this run; UserError where it is of another one."""
    forecast = read_forecast(path)
    asked = {"model": recipe.model, "gpus": recipe.gpus, "per-gpu-batch": recipe.per_gpu_batch}
    foretold = {"model": forecast.model, "gpus": forecast.gpus, "per-gpu-batch": forecast.per_gpu_batch}
    for name, value in asked.items():
        if foretold[name] != value:
            raise UserError(
                f"forecast {path} is of another run (--{name} {foretold[name]}, here {value}): make one for this run"
            )
    if processes != forecast.gpus:
        raise UserError(
            f"forecast {path} is of {forecast.gpus} GPUs with one virtual worker each, and this run has {processes} "
            "processes: expected one for each"
        )
    return forecast


def held_against(
    forecast: Forecast, records: Sequence[dict[str, Any]], global_batch: int
) -> list[tuple[str, str]]:
    """Of a run with these metrics, as (topic, sentence); nothing where no step was timed."""
    train = [
        record for record in records if record.get("kind") == "train" and record.get("images_per_second")
    ]
    steady = train[1:] or train  # the first one has what starts up
    if not steady:
        return []
    step = statistics.median(global_batch / record["images_per_second"] for record in steady)
    wait = statistics.median(record.get("data_wait") or 0.0 for record in steady)
    off = step / forecast.step.value - 1
    within = "within" if forecast.step.low <= step <= forecast.step.high else "outside"
    text = (
        f"a step was foretold to take {duration(forecast.step.value)} ({duration(forecast.step.low)} to "
        f"{duration(forecast.step.high)}) and took {duration(step)}: {100 * off:+.0f} %, {within} the interval"
    )
    parts = _parts(forecast.share, step, wait, _exposed(records))
    return [("forecast", f"{text}; {', '.join(f'{name} {1000 * more:+.0f} ms' for name, more in parts)}")]


def _parts(share: Share, step: float, wait: float, exposed: float | None) -> list[tuple[str, float]]:
    """By how many seconds each part was longer than foretold; `wait` and `exposed` are shares of the step."""
    data = ("waiting for images", wait * step - share.data)
    if exposed is None:
        computing = share.compute + share.slowest + share.network
        return [("computing and the network", (1 - wait) * step - computing), data]
    network = exposed * step
    return [
        ("computing", (1 - wait) * step - network - share.compute - share.slowest),
        ("the network", network - share.network),
        data,
    ]


def _exposed(records: Sequence[dict[str, Any]]) -> float | None:
    """The share of its time in which the slowest rank waits for the network: it waits for no other rank."""
    ranks = [record for record in records if record.get("kind") == "ranks"]
    try:
        spent = [
            [sum(of) for of in zip(*(record[name] for record in ranks), strict=True)]
            for name in ("data", "compute", "network")
        ]
        return min(
            (network / (data + compute + network) for data, compute, network in zip(*spent, strict=True)),
            default=None,
        )
    except (LookupError, TypeError, ValueError, ZeroDivisionError):  # records of others may hold anything
        return None
