"""Hosts of unlike hardware: `hvd-lb doctor --selftest --hosts` finds who computes other bits, and a run tells that some
may."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import Host, lab
from real_runs import SMALL

pytest.importorskip("horovod")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HVD_LB = Path(sys.executable).with_name("hvd-lb")
WHERE = ("--hosts", "h1:1,h2:1,h3:1", "--device", "cpu")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(["h1", "h2", "h3"]) as hosts:
        yield hosts


def selftest(host: Host, folder: Path, status: int) -> str:
    command = [HVD_LB, "doctor", "--selftest", *WHERE, "--output", folder / "runs"]
    done = host.run(command, check=False, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout


def test_hosts_that_compute_the_same_bits(hosts: list[Host], tmp_path: Path) -> None:
    assert selftest(hosts[0], tmp_path, 0).startswith(
        "ok      3 processes on 3 hosts compute the same bits: "
    )


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has no such instructions"
)
def test_one_without_vector_instructions_is_named(hosts: list[Host], tmp_path: Path) -> None:
    hosts[2].kill()
    hosts[2].boot(ATEN_CPU_CAPABILITY="default")
    try:
        wrong, sentence = selftest(hosts[0], tmp_path, 1).splitlines()
    finally:
        hosts[2].kill()
        hosts[2].boot()
    assert wrong.startswith("wrong   rank 2 on h3 computes other bits than rank 0 on h1: ")
    assert "cpu_capability" in wrong
    assert sentence == "a reproducible run on these hosts would not be reproducible"


@pytest.mark.parametrize("reproducible", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_reproducible_run_tells_which_hosts_have_another_cpu(
    hosts: list[Host], tmp_path: Path, reproducible: bool
) -> None:
    mode = "--reproducible" if reproducible else "--no-reproducible"
    recipe = ("train", *SMALL, "--gpus", 3, "--per-gpu-batch", 8, "--steps", 1, mode)
    with hosts[2].with_another_cpu() as feature:
        done = hosts[0].run([HVD_LB, *recipe, *WHERE[:2], "--output", tmp_path / "run"], timeout=300)
    before, warned, _ = done.stdout.partition(
        f"warning: h3: other hardware than rank 0 has on h1 (CPU without {feature}), which may compute other bits, and "
        "then so does this run: `hvd-lb doctor --selftest --hosts …` tells\n"
    )
    assert bool(warned) == reproducible, done.stdout
    assert not warned or "step" not in before.partition("hosts: ")[2]
