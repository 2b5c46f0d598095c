"""Whole runs of `hvd-lb train` against plain.py, which shares nothing with hvd-lb but initial weights and images.

Largest absolute differences measured, in float64 after 18 steps that move weights by up to 0.2:

                                weights   running statistics   momentum u   loss
    2 processes                 1.7e-15   4.9e-15              7.2e-14      1.8e-15
    1 or 3, reproducible        4.3e-15   1.8e-14              1.3e-13      3.1e-15

u is v / η with η = 2.2e-4 in the last step, which magnifies the rounding of v. Fixed point has 49 bits for the largest
term that a tensor had in the step before (7 terms), float64 has 53 for every number.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from plain_case import EXACT, SETTINGS, Reference, largest_difference, run_plain, velocity_names
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return run_plain(tmp_path_factory.mktemp("plain"), steps=18)


def train(run: Path, *more: object) -> None:
    options = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", value)]
    how = ("--device", "cpu", "--threads", 1, "--log-every", 1, "--eval-every", "never", "--output", run)
    command = [sys.executable, "-m", "hvd_lb_cli.main", "train", *options, *how, *more]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    ("processes", "mode"),
    [(2, "--no-reproducible"), (1, "--reproducible"), (3, "--reproducible")],
    ids=["2 processes", "1 process, reproducible", "3 processes, reproducible"],
)
def test_equals_plain_pytorch(plain: Reference, tmp_path: Path, processes: int, mode: str) -> None:
    """Of 3 processes the first has no image in the last step of an epoch."""
    run = tmp_path / "run"
    train(run, "--processes", processes, mode)

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["lr"] for line in steps] == pytest.approx(plain.learning_rates, rel=1e-14, abs=0)

    last = run / "checkpoints" / "last"
    model, optimizer = load_file(last / "model.safetensors"), load_file(last / "optimizer.safetensors")
    velocities = {name: optimizer[f"state/{i}/velocity"] for i, name in enumerate(velocity_names())}
    momentum = {name: velocity / plain.learning_rates[-1] for name, velocity in velocities.items()}
    differences = {
        "weights": largest_difference(plain.weights, model),
        "statistics": largest_difference(plain.statistics, model),
        "momentum": largest_difference(plain.momentum, momentum),
        "loss": max(abs(line["loss"] - loss) for line, loss in zip(steps, plain.losses, strict=True)),
    }
    assert all(difference < EXACT for difference in differences.values()), differences
