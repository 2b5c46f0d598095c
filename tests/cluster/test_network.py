"""`hvd-lb doctor --network` on three hosts, whose links are slowed down by the kernel."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, lab

pytest.importorskip("horovod")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HVD_LB = Path(sys.executable).with_name("hvd-lb")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """All links at a rate that two busy cores can serve."""
    with lab(["h1", "h2", "h3"]) as hosts:
        for host in hosts:
            host.slow_down("400mbit")
        yield hosts


def check(host: Host, folder: Path, *more: object, status: int) -> tuple[list[str], list[str], dict]:  # type: ignore[type-arg]
    """Its lines, those that tell what is wrong, and the figures."""
    figures = folder / "figures.json"
    where = ("--hosts", "h1,h2,h3", "--device", "cpu", "--output", folder / "runs", "--json", figures)
    done = host.run([HVD_LB, "doctor", "--network", *where, *more], check=False, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    assert [path.name for path in folder.iterdir()] == ["figures.json"]
    lines = done.stdout.splitlines()
    return lines, [line for line in lines if line.startswith("wrong ")], json.loads(figures.read_text())


def test_a_network_without_a_slow_link(hosts: list[Host], tmp_path: Path) -> None:
    lines, wrong, figures = check(hosts[0], tmp_path, status=0)
    assert wrong == []
    assert lines[-1] == "ok      all links between 3 hosts are alike, within a factor of two"
    assert [host["name"] for host in figures["hosts"]] == ["h1", "h2", "h3"]
    assert {host["interface"] for host in figures["hosts"]} == {"eth0"}
    assert len(figures["links"]) == 6
    for link in figures["links"]:
        assert 10e6 < link["bytes_per_second"] < 75e6, link  # 400 Mbit/s are 50 MB/s
    sizes = [size for size, _ in figures["allreduces"]]
    assert sizes[0] == 1024
    assert sizes[-1] >= 4 << 20


def test_a_host_with_a_slow_link_is_named(hosts: list[Host], tmp_path: Path) -> None:
    hosts[2].slow_down("50mbit")
    try:
        _, (line,), figures = check(hosts[0], tmp_path, status=1)
    finally:
        hosts[2].slow_down("400mbit")
    assert line.startswith("wrong   the link of h3 is slow, what it sends: ")
    rates = {(link["source"], link["target"]): link["bytes_per_second"] for link in figures["links"]}
    assert max(rates[2, 0], rates[2, 1]) < 10e6 < min(rates[0, 1], rates[1, 0])


def test_what_cannot_be_measured_is_refused(hosts: list[Host], tmp_path: Path) -> None:
    done = hosts[0].run(
        [HVD_LB, "doctor", "--network", "--hosts", "h1:1", "--device", "cpu", "--output", tmp_path],
        check=False,
    )
    assert done.returncode == 2
    assert "measures between processes, and here is one" in done.stderr
    assert list(tmp_path.iterdir()) == []
