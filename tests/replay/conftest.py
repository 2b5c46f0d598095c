"""A recorded run, made once for all tests of replaying it; and copies that may be tampered with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = (
    *("simulate", "--run", "--data", "digits", "--device", "cpu", "--model", "resnet8", "--threads", 1),
    *(
        "--gpus",
        2,
        "--steps",
        30,
        "--log-every",
        2,
        "--checkpoint-every",
        "8steps",
        "--digest-every",
        "4steps",
    ),
    *("--keep-checkpoints", 9),
)


def make(output: Path, *more: object) -> Path:
    """With all its checkpoints: one is left out, and that is told, while a slow disk is still at the one before."""
    command = [sys.executable, "-m", "hvd_lb_cli.main", *map(str, (*RUN, *more, "--output", output))]
    for _ in range(5):
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        if "so that of step" not in (output / "metrics.jsonl").read_text():
            return output
        shutil.rmtree(output)
    pytest.fail("the disk is too slow for a checkpoint each 8 steps")


@pytest.fixture(name="make")
def making() -> Callable[..., Path]:
    """make(output, *options): a run like the recorded one."""
    return make


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty steps, an epoch and a bit, of two virtual workers in the reproducible mode."""
    return make(tmp_path_factory.mktemp("recorded") / "run", "--reproducible")


@pytest.fixture(scope="session")
def in_float_mode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("float") / "run", "--together", 2)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a run, to be changed."""

    def copy(run: Path) -> Path:
        return Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))

    return copy
