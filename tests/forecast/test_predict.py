from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.forecast.pages import read_forecast, write_forecast
from hvd_lb.forecast.predict import RESTART_SECONDS, Device, Forecast, Run, predict, sizes
from hvd_lb.forecast.profile import ClusterProfile, load_cluster
from hvd_lb.forecast.step import Compute, Filled
from hvd_lb.forecast.words import recommendation, rows

COMPUTE = Compute(
    0.030, 0.060, 0.002, (Filled(4 << 20, 0.02), Filled(40 << 20, 0.05), Filled(1 << 20, 0.06)), 32
)
DEVICE = Device("mine", COMPUTE, error=0.02)
RUN = Run("resnet50", gpus=256, per_gpu_batch=32, steps_per_epoch=156, steps=14040, checkpoint_every=156)


def slow(gbit: float = 10.0) -> ClusterProfile:
    return ClusterProfile.model_validate(
        {"name": "slow", "gpus_per_host": 1, "between": {"latency_us": 20, "bandwidth_gbit_s": gbit}}
    )


def test_one_gpu_waits_for_nobody() -> None:
    forecast = predict(replace(RUN, gpus=1), DEVICE, slow())
    assert forecast.step.value == pytest.approx(COMPUTE.seconds)
    assert forecast.efficiency.value == 1
    assert forecast.share.network == 0
    assert forecast.total.value == pytest.approx(14040 * COMPUTE.seconds)


def test_intervals_hold_the_forecast_and_grow_with_what_is_uncertain() -> None:
    sure, unsure = (predict(RUN, replace(DEVICE, error=error), slow()) for error in (0.0, 0.2))
    for forecast in (sure, unsure):
        for estimate in (forecast.step, forecast.total, forecast.efficiency, forecast.images_per_second):
            assert 0 < estimate.low <= estimate.value <= estimate.high
    assert unsure.step.high - unsure.step.low > sure.step.high - sure.step.low


def test_without_uncertainty_an_interval_is_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_lb.forecast.predict.MODEL_ERROR", 0.0)
    cluster = slow().model_copy(update={"between": slow().between.model_copy(update={"error": 0.0})})
    step = predict(RUN, replace(DEVICE, error=0.0, unlike=True), cluster).step
    assert step.low == pytest.approx(step.value) == pytest.approx(step.high)


def test_a_faster_network_is_faster_and_what_would_mend_it_does() -> None:
    fast, slower = predict(RUN, DEVICE, slow(100)), predict(RUN, DEVICE, slow(1))
    assert fast.step.value < slower.step.value
    assert slower.share.network > 0.5 * slower.step.value
    few = replace(RUN, gpus=8)
    factor = predict(few, DEVICE, slow(5)).bandwidth_factor
    assert factor is not None
    assert factor > 1
    mended = predict(few, DEVICE, slow(5 * factor))
    assert mended.share.network <= 0.0101 * mended.step.value


def test_latency_that_no_bandwidth_hides() -> None:
    late = ClusterProfile.model_validate(
        {"name": "late", "gpus_per_host": 1, "between": {"latency_us": 5000, "bandwidth_gbit_s": 1000}}
    )
    forecast = predict(RUN, DEVICE, late)
    assert forecast.bandwidth_factor is None
    assert "no bandwidth would hide" in dict(rows(forecast))["what limits"]
    assert forecast.scaling["halving-doubling"][-1].efficiency.value > forecast.efficiency.value
    assert "halving-doubling would be" in recommendation(forecast)


def test_unlike_gpus_are_waited_for() -> None:
    forecast = predict(RUN, replace(DEVICE, compute=replace(COMPUTE, spread=0.05)), load_cluster("dgx-h100"))
    assert forecast.share.slowest > 0.1 * COMPUTE.seconds
    assert sum(forecast.share.model_dump().values()) == pytest.approx(forecast.step.value)


def test_a_slow_loader_is_told() -> None:
    forecast = predict(RUN, replace(DEVICE, loader=1000.0), load_cluster("dgx-h100"))
    assert forecast.step.value == pytest.approx(8 * 32 / 1000)
    assert forecast.share.data > 0
    said = dict(rows(forecast))
    assert "waiting for images" in said["what limits"]
    assert "times as many are needed" in said["loading"]
    enough = predict(RUN, replace(DEVICE, loader=1.01 * forecast.loader_needed), load_cluster("dgx-h100"))
    assert enough.share.data == 0
    few = predict(replace(RUN, gpus=2), replace(DEVICE, loader=500.0), load_cluster("dgx-h100"))
    assert few.step.value == pytest.approx(2 * 32 / 500)  # a host's loader is shared by those that are there


def test_the_same_run_on_fewer_gpus_has_the_same_steps() -> None:
    forecast = predict(RUN, DEVICE, slow(100))
    one, *_, all_ = forecast.same_run
    assert (one.gpus, all_.gpus) == (1, 256)
    assert one.step.value == pytest.approx(256 * 0.090 + 0.002)
    assert all_.step.value == forecast.step.value
    eight = next(
        same for same in predict(replace(RUN, gpus=12), DEVICE, slow(100)).same_run if same.gpus == 8
    )
    assert eight.step.value > 2 * 0.090  # some of them have two virtual workers, and the others wait


def test_money_is_for_whole_hosts() -> None:
    cluster = load_cluster("dgx-h100").model_copy(update={"price_per_gpu_hour": 2.0})
    forecast = predict(replace(RUN, gpus=12), DEVICE, cluster)
    assert forecast.price is not None
    assert forecast.price.value == pytest.approx(16 * 2.0 * forecast.total.value / 3600)


@pytest.mark.parametrize("per_host", [3, 6, 10])
def test_hosts_whose_gpus_are_no_power_of_two(per_host: int) -> None:
    cluster = ClusterProfile.model_validate(
        {
            "name": "ours",
            "gpus_per_host": per_host,
            "between": {"latency_us": 20, "bandwidth_gbit_s": 100},
            "inside": {"latency_us": 3, "bandwidth_gbit_s": 2400},
        }
    )
    for gpus in (1, 2, per_host, 16, 4 * per_host):
        forecast = predict(replace(RUN, gpus=gpus), DEVICE, cluster)
        assert rows(forecast)[-1][0] == "recommended"
        assert forecast.same_run[-1].gpus == gpus


def test_failures_and_what_going_on_without_ranks_saves() -> None:
    forecast = predict(RUN, DEVICE, load_cluster("dgx-h100"))
    assert forecast.failures == pytest.approx(256 * forecast.total.value / 3600 / 50700)
    assert forecast.failures_cost is not None
    assert forecast.failures_cost_elastic is not None
    assert forecast.failures_cost > forecast.failures_cost_elastic > 0
    lost = RUN.checkpoint_every * forecast.step.value / 2  # on average
    assert forecast.failures_cost == pytest.approx(forecast.failures * (RESTART_SECONDS + lost))
    assert predict(RUN, DEVICE, slow()).failures is None
    every_minute = replace(RUN, checkpoint_every=None, checkpoint_seconds=60.0)
    often = predict(every_minute, DEVICE, load_cluster("dgx-h100"))
    assert often.failures_cost == pytest.approx(forecast.failures * (RESTART_SECONDS + 30.0))


def test_a_forecast_up_to_4096_gpus_counts_every_doubling() -> None:
    assert sizes(4096) == [2**bit for bit in range(13)]
    assert sizes(352, 8)[-2:] == [256, 352]
    assert sizes(12, 6) == [1, 2, 4, 6, 8, 12]
    forecast = predict(replace(RUN, gpus=4096), DEVICE, slow(100))
    assert len(forecast.spans) < 20  # of 4,096 microbatches on one GPU, too
    assert [len(points) for points in forecast.scaling.values()] == [13, 13, 13]


def test_files(tmp_path: Path) -> None:
    forecast = predict(RUN, DEVICE, load_cluster("big-basin"))
    write_forecast(tmp_path / "new", forecast, [("note", "1 < 2")])
    assert read_forecast(tmp_path / "new" / "forecast.json") == forecast
    trace = json.loads((tmp_path / "new" / "step-trace.json").read_text())
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == len(forecast.spans)
    page = (tmp_path / "new" / "forecast.html").read_text("utf-8")
    assert "1 &lt; 2" in page
    assert all(f"<th>{topic}</th>" in page for topic, _ in rows(forecast))
    assert (tmp_path / "new" / "forecast.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": 1, "step": NaN}'])
def test_what_is_no_forecast(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "forecast.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is none: expected the forecast.json"):
        read_forecast(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_forecast(tmp_path / "other.json")


def test_the_paper_s_curve_is_beside_its_own_model_only() -> None:
    assert predict(RUN, DEVICE, slow()).paper is not None
    other: Forecast = predict(replace(RUN, model="resnet18"), DEVICE, slow())
    assert other.paper is None
    assert "the paper" not in dict(rows(other))
