"""Ranks on two hosts that torchrun, srun or mpirun has started: one run, with the bits of any other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hosts import Host, lab
from slurm import Cluster, slurm

CODE = os.environ.get("PYTHONPATH") or str(Path(__file__).parents[2])
HVD_LB = (sys.executable, "-m", "hvd_lb_cli.main")
RECIPE = (
    *("--data", "digits", "--device", "cpu", "--model", "resnet8", "--threads", "1", "--reproducible"),
    *("--per-gpu-batch", "16", "--steps", "4"),
)
ALONE = {"PYTHONPATH": CODE, "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(["h1", "h2"]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def cluster(hosts: list[Host]) -> Iterator[Cluster]:
    with slurm(hosts[0], dict.fromkeys(hosts, 2)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def simulated(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = tmp_path_factory.mktemp("simulated") / "run"
    command = [*HVD_LB, "simulate", *RECIPE, "--gpus", 2, "--run", "--output", run]
    hosts[0].run(command, env=ALONE, timeout=240)
    return weights(run)


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


def assert_one_run(run: Path, said: str, engine: str) -> None:
    assert said.count("report: ") == 1
    job = json.loads((run / "logs" / "job.json").read_text())
    assert (job["hosts"], job["engine"]) == ([["h1", 1], ["h2", 1]], engine)
    assert {path.name for path in (run / "logs").glob("rank-*.log")} == {
        "rank-0000-h1.log",
        "rank-0001-h2.log",
    }


def test_by_torchrun_on_each_host(hosts: list[Host], simulated: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = []
    for number, host in enumerate(hosts):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
            *("--node-rank", number, "--master-addr", hosts[0].address, "--master-port", 29500),
            *("-m", "hvd_lb_cli.main", "train", *RECIPE, "--output", run),
        ]
        started.append(host.start(command, env=ALONE, stdin=-3, stdout=-1, stderr=-2))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert_one_run(run, "".join(said), "torch")
    assert weights(run) == simulated


def test_by_srun(cluster: Cluster, simulated: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    srun = ("srun", "--nodes", 2, "--ntasks", 2, "--kill-on-bad-exit=1")
    said = cluster.run([*srun, *HVD_LB, "train", *RECIPE, "--output", run], env=ALONE, timeout=300).stdout
    assert_one_run(run, said, "torch")
    assert weights(run) == simulated
    wrong = cluster.run(
        [*srun, *HVD_LB, "train", *RECIPE, "--gpus", 1], env=ALONE, check=False, timeout=120, cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("hvd-lb: error: ") == 1
    assert "srun has started 2 processes, and --gpus 1 is for 1 at most" in wrong.stderr


def test_by_mpirun(hosts: list[Host], simulated: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mpirun = [
        *("mpirun", "--allow-run-as-root", "-np", 2, "-H", "h1:1,h2:1", "-x", "PYTHONPATH"),
        *("--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"),
    ]
    hosts[0].know(*hosts)
    command = [*mpirun, *HVD_LB, "train", *RECIPE, "--output", run]
    said = hosts[0].run(command, env=ALONE, timeout=300).stdout
    assert_one_run(run, said, "horovod")
    assert weights(run) == simulated
