"""p × model × mode through real horovodrun: bitwise the same in the reproducible mode, to rounding in the float one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "ranks" / "matrix.py"
MODELS = ("resnet20", "mobilenet_v3_small", "squeezenet1_1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process without Horovod makes of it."""
    folder = tmp_path_factory.mktemp("1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, WORKER, folder], check=True, timeout=300, env=environment)
    return folder


@pytest.fixture(
    scope="module", params=[3, pytest.param(8, marks=pytest.mark.long)], ids=lambda p: f"{p} processes"
)
def shared(
    request: pytest.FixtureRequest, horovodrun: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a job of p processes makes of it."""
    folder = tmp_path_factory.mktemp(str(request.param))
    job = horovodrun(WORKER, request.param, folder, timeout=400)
    assert job.returncode == 0, job.output
    return folder


@pytest.mark.parametrize("model", [*MODELS, "efficientnet_b0"])
def test_reproducible_runs_are_bitwise_the_same(alone: Path, shared: Path, model: str) -> None:
    results = [json.loads((folder / f"{model}-reproducible.json").read_text()) for folder in (alone, shared)]
    assert len(results[0]["losses"]) == 10
    assert results[0]["evaluation"]["images"] == 41
    assert results[0] == results[1]


@pytest.mark.parametrize("model", MODELS)
def test_float_runs_agree_to_rounding(alone: Path, shared: Path, model: str) -> None:
    """Also with the reproducible mode: it is the same mathematics."""
    runs = [load_file(folder / f"{model}-float.safetensors") for folder in (alone, shared)]
    runs.append(load_file(alone / f"{model}-reproducible.safetensors"))
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        for name, tensor in runs[0].items():
            if tensor.is_floating_point():
                scale = max(1.0, float(tensor.abs().max())) if name.startswith("model.") else 1.0
                assert torch.allclose(other[name], tensor, rtol=0, atol=1e-5 * scale), name


def test_an_overflow_is_mended_where_processes_have_no_images(alone: Path, shared: Path) -> None:
    results = [json.loads((folder / "overflow.json").read_text()) for folder in (alone, shared)]
    assert results[0]["repeated"] == [1]
    assert len(results[0]["losses"]) == 4
    assert results[0] == results[1]
