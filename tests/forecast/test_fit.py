from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.forecast.collectives import Link, ring
from hvd_lb.forecast.fit import fit_cluster
from hvd_lb.forecast.profile import figures, load_cluster, load_device
from hvd_lb.network.exchange import SIZES
from hvd_lb.network.measure import HostPlace, NetworkReport
from hvd_lb.world.build import begins_at_once

OVERHEAD, LINK = 700e-6, Link(50e-6, 8e-9)


def report(processes: int, hosts: int, **changes: Any) -> NetworkReport:
    places = [
        HostPlace(name=f"h{number}", interface="eth0", address=f"10.0.0.{number}", speed=None, mtu=None)
        for number in range(hosts)
    ]
    servers = hosts if hosts > 1 else processes
    return NetworkReport(
        **{
            "processes": processes,
            "device": "cpu",
            "hosts": places,
            "allreduces": [(size, OVERHEAD + ring(servers, size).seconds(LINK)) for size in SIZES],
            "links": [],
            "latencies": [(0, 1, LINK.alpha)] if hosts > 1 else [],
            "exchange_slowdown": 1.25,
            "compute_slowdown": 1.5,
            "cycle_ms": 10.0,
            **changes,
        }
    )


@pytest.mark.parametrize(("processes", "hosts"), [(2, 2), (5, 5), (16, 2)])
def test_a_known_network_is_found_again(processes: int, hosts: int) -> None:
    found = fit_cluster(report(processes, hosts), name="x", cores=4, when="today")
    assert found.gpus_per_host == processes // hosts
    link = found.between.link()
    assert (link.alpha, link.beta) == (pytest.approx(LINK.alpha), pytest.approx(LINK.beta))
    assert found.overhead_us == pytest.approx(1e6 * OVERHEAD)
    assert found.between.error == 0.02
    assert (found.exchange_slowdown, found.compute_slowdown, found.cycle_ms) == (1.25, 1.5, 10.0)
    assert set(found.sources) == {name for name, _ in figures(found)}


def test_on_one_host_all_latency_is_that_of_steps() -> None:
    found = fit_cluster(report(3, 1), name="x", cores=4, when="today")
    assert found.between.link().alpha == pytest.approx(LINK.alpha + OVERHEAD / 4)
    assert found.overhead_us == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("allreduces", [[(1024, 1.0)], [(1024, 1.0), (2048, 0.5)]])
def test_what_no_line_can_be_drawn_through(allreduces: list[tuple[int, float]]) -> None:
    with pytest.raises(UserError, match="cannot be told"):
        fit_cluster(report(2, 2, allreduces=allreduces), name="x", cores=1, when="today")


@pytest.mark.slow
def test_this_machine_is_measured_and_its_profile_is_read(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    what = ("--data", "digits", "--model", "resnet8", "--per-gpu-batch", 16)
    said = hvd_lb("measure", tmp_path / "here.yaml", "--device", "cpu", "--output", tmp_path, *what)
    assert said.status == 0, said.err
    assert re.search(r"here\.yaml: [\d.,]+ µs a step, [\d.,]+ Gbit/s", said.out)
    profile = load_cluster(str(tmp_path / "here.yaml"))
    assert f"computing beside an allreduce {profile.compute_slowdown:.2f} times" in said.out
    assert (profile.name, profile.gpus_per_host) == ("here", 1)
    assert profile.cycle_ms == (1 if begins_at_once() else 10)  # of Horovod in a run on CPUs
    assert min(profile.exchange_slowdown, profile.compute_slowdown) >= 1
    assert f"here.yaml: a host loads {profile.loader_images_s:,.0f} images/s" in said.out
    assert "digits" in profile.sources["loader_images_s"]
    device = load_device(str(tmp_path / "here-device.yaml"))
    assert (device.model, device.per_gpu_batch, device.name) == ("resnet8", 16, "here-device")
    assert f"here-device.yaml: {device.microbatch_ms:,.1f} ms for 16 images by resnet8" in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here-device.yaml", "here.yaml"]


def test_what_a_machine_cannot_measure_is_said_before_the_network_is(
    hvd_lb: Callable[..., Any], tmp_path: Path
) -> None:
    said = hvd_lb("measure", tmp_path / "here.yaml", "--device", "cpu", "--model", "resnet5000")
    assert (said.status, said.err.count("\n"), said.out) == (2, 1, "")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_told_first(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    said = hvd_lb("measure", tmp_path / "no" / "here.yaml", "--device", "cpu")
    assert (said.status, said.out) == (2, "")
    assert "expected the name of a file in a folder that is there" in said.err
