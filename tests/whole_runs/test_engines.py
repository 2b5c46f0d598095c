"""Runs by torch.distributed have the bits of those by Horovod, and need none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_runs import SMALL, Start, finish

WITHOUT_HOROVOD = Path(__file__).parent / "without_horovod"
RECIPE = (*SMALL, "--gpus", 3, "--per-gpu-batch", 16, "--steps", 8, "--reproducible")

pytestmark = pytest.mark.slow


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = tmp_path_factory.mktemp("simulated") / "run"
    command = [sys.executable, "-m", "hvd_lb_cli.main", "simulate", *RECIPE, "--run", "--output", run]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=240)
    return weights(run)


@pytest.mark.parametrize(
    ("engine", "processes"), [pytest.param("torch", 2, marks=pytest.mark.long), ("torch", 3), ("horovod", 3)]
)
def test_both_engines_have_the_bits_of_one_process(
    engine: str, processes: int, simulated: bytes, start: Start, tmp_path: Path
) -> None:
    if engine == "horovod":
        pytest.importorskip("horovod")
    run = tmp_path / "run"
    out, _ = finish(start("train", *RECIPE, "--processes", processes, "--engine", engine, "--output", run))
    assert f"engine: {engine}, as asked for" in out
    assert weights(run) == simulated


def test_without_horovod_several_processes_train(
    simulated: bytes, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [os.fspath(WITHOUT_HOROVOD), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    run = tmp_path / "run"
    out, _ = finish(start("train", *RECIPE, "--processes", 2, "--output", run))
    assert "engine: torch, Horovod is not installed" in out
    assert weights(run) == simulated
    _, err = finish(start("train", *RECIPE, "--processes", 2, "--engine", "horovod"), status=2)
    assert err.startswith("hvd-lb: error: Horovod is not installed, but several processes need it: ")
    _, err = finish(start("train", *RECIPE, "--processes", 2, "--autotune"), status=2)
    assert "--autotune is Horovod's own, and this run has torch.distributed (Horovod is not installed)" in err
