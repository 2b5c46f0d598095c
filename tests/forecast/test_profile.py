from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.forecast.profile import ClusterProfile, figures, load_cluster, load_device, make_profile, shipped

LINK = {"latency_us": 10.0, "bandwidth_gbit_s": 10.0}
GOOD: dict[str, Any] = {"name": "mine", "gpus_per_host": 1, "between": LINK}


@pytest.mark.parametrize("name", shipped("clusters"))
def test_shipped_clusters_have_a_source_for_every_number(name: str) -> None:
    profile = load_cluster(name)
    assert profile.name == name
    assert set(profile.sources) == {figure for figure, _ in figures(profile)}


@pytest.mark.parametrize("name", shipped("devices"))
def test_shipped_devices_have_a_source_for_every_time(name: str) -> None:
    profile = load_device(name)
    assert profile.name == name
    assert {"microbatch_ms", "error"} <= set(profile.sources)


def test_units() -> None:
    link = make_profile(ClusterProfile, GOOD | {"between": LINK | {"efficiency": 0.5}}, "x").between.link()
    assert link.alpha == pytest.approx(1e-5)
    assert link.beta == pytest.approx(8 / 5e9)


def test_a_profile_is_written_as_it_is_read(tmp_path: Path) -> None:
    profile = load_cluster("big-basin")
    path = tmp_path / "mine.yaml"
    path.write_text(profile.to_yaml(), "utf-8")
    assert load_cluster(str(path)) == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ngpus_per_host: 1", "between is missing"),
        ("name: x\ngpus_per_host: 1\nbetween: {latency_us: 1}", "between.bandwidth_gbit_s is missing"),
        (
            "name: x\ngpus_per_host: 1\nbetween: {latency_us: 1, bandwidth_gbit_s: -25}",
            "between.bandwidth_gbit_s = -25: expected a value greater than 0",
        ),
        (
            "name: x\ngpus_per_host: 1\nbetween: {latency_us: .nan, bandwidth_gbit_s: 1}",
            "between.latency_us = nan: expected a finite number",
        ),
        (
            "name: x\ngpus_per_host: 1\nbetween: {latency_us: 1, bandwidth_gbit_s: .inf}",
            "between.bandwidth_gbit_s = inf: expected a finite number",
        ),
        (
            "name: x\ngpus_per_host: 1\nbetween: {latency_us: 1e300, bandwidth_gbit_s: 1}",
            "between.latency_us = 1e+300: expected a value less than or equal to 1e+30",
        ),
        (
            "name: x\ngpus_per_host: 1\nalgorithm: rings\nbetween: {latency_us: 1, bandwidth_gbit_s: 1}",
            "algorithm = rings: unknown algorithm: expected ring, halving-doubling, tree; did you mean 'ring'?",
        ),
        (
            "name: x\ngpus_per_host: 0\nbetween: {latency_us: 1, bandwidth_gbit_s: 1}",
            "gpus_per_host = 0: expected a value greater than or equal to 1",
        ),
        (
            "name: x\ngpus_per_host: 8\nbetween: {latency_us: 1, bandwidth_gbit_s: 1}",
            "inside is missing: a host with several GPUs has a link between them",
        ),
        (
            "name: x\ngpus_per_host: 1\nbetween: {latency_us: 1, bandwith_gbit_s: 1, bandwidth_gbit_s: 1}",
            "unknown field 'between.bandwith_gbit_s'; did you mean 'bandwidth_gbit_s'?",
        ),
        (
            "name: x\ngpus_per_host: 1\nbetween: 10",
            "between = 10: expected fields, each as `name: value`",
        ),
        (
            "name: x\ngpus_per_host: 1\nbetween: {latency_us: fast, bandwidth_gbit_s: 1}",
            "between.latency_us = fast: expected a number",
        ),
        (
            "name: x\ngpus_per_host: 1\nbetween: {latency_us: 1, bandwidth_gbit_s: 1}\nsources: {cores: me}",
            "sources: 'cores' is no figure of this profile",
        ),
        ("- 1", "expected `field: value` lines"),
        ("name: [", "line 1"),
    ],
)
def test_bad_profiles_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError) as failure:
        load_cluster(str(path))
    said = str(failure.value)
    assert said.startswith(f"cluster profile {path}")
    assert message in said
    assert "\n" not in said


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"neither one of .*big-basin.*; did you mean 'big-basin'\?"):
        load_cluster("bigbasin")
