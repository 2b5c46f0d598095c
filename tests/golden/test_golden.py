"""The mathematics has not changed: digests of what fixed seeds give, made before it was moved about.

A change that should not touch the mathematics leaves digests.json as it is. One that should writes it anew, and says
in its commit why:

    HVD_LB_GOLDEN=write .venv/bin/python -m pytest tests/golden

The runs are whole ones, from the command line to the files of the run directory. Kernels are held to instruction sets
that every x86-64 processor has, so the digests hold on each of them; another torch may round otherwise.
"""

import hashlib
import json
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_runs import Start, finish, records
from safetensors.numpy import load_file

from hvd_lb.plan.augment import CentreWindows, Flip, RandomWindows
from hvd_lb.plan.counter import generator_seed, uniform
from hvd_lb.plan.samples import SamplePlan
from hvd_lb.plan.shuffle import Permutation

DIGESTS = Path(__file__).with_name("digests.json")
SEEDS, EPOCHS = (0, 1, 12345), (0, 1, 89)
PORTABLE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}


# Not of the mathematics, or told of it since these digests were made.
NOT_DIGESTED = ("images_per_second", "data_wait", "gradient_norm", "peak_memory_gb")


def digest_of(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]


def check(name: str, found: str) -> None:
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    if os.environ.get("HVD_LB_GOLDEN") == "write":
        DIGESTS.write_text(json.dumps({**known, name: found}, indent=1, sort_keys=True) + "\n")
        return
    assert found == known[name], f"{name} is not what it was: see {Path(__file__).name}"


def sizes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, widths and heights of 2,000 images: usual ones, tiny ones, and some for which every try of a crop fails."""
    ids = np.arange(2000)
    return ids, (1 + 37 * ids % 641).astype(np.int32), (1 + 101 * ids % 487).astype(np.int32)


def test_permutations() -> None:
    parts = []
    for size in (1, 2, 10, 1438, 60_000, 1_281_167, 10**9):
        for seed in SEEDS:
            for epoch in EPOCHS:
                start = size // 3
                parts.append(Permutation(size, seed, epoch).slice(start, min(size, start + 500)))
    check("permutations", digest_of(*parts))


def test_sample_plans() -> None:
    parts = []
    for last_batch in ("drop", "keep"):
        plan = SamplePlan(1000, 7, 9, generator_seed(3, 2), last_batch)
        for epoch in EPOCHS:
            for step in range(plan.steps_per_epoch):
                parts += [plan.image_ids(epoch, step, worker) for worker in range(7)]
        parts += [plan.steps_per_epoch, plan.step_images(plan.steps_per_epoch - 1)]
    check("sample_plans", digest_of(*parts))


def test_random_numbers() -> None:
    numbers = [uniform(seed, epoch, np.arange(1000)) for seed in SEEDS for epoch in EPOCHS]
    check("random_numbers", digest_of(*numbers, generator_seed(5, 1, 17, 255)))


def test_random_windows() -> None:
    parts = []
    for scale, ratio in (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.6, 1.0), (1.0, 1.0)), ((0.9, 1.0), (0.2, 5.0))):
        for seed in SEEDS:
            for epoch in EPOCHS:
                windows = RandomWindows(seed, scale, ratio).windows(epoch, *sizes())
                parts += [windows.x, windows.y, windows.width, windows.height]
    check("random_windows", digest_of(*parts))


def test_flips() -> None:
    parts = [
        RandomWindows(seed, augmentations=(Flip(flip),)).windows(epoch, *sizes()).augmentations[0].parameters
        for seed in SEEDS
        for epoch in EPOCHS
        for flip in (0.0, 0.3, 0.5, 1.0)
    ]
    check("flips", digest_of(*parts))


def test_centre_windows() -> None:
    parts = []
    for fraction in (224 / 256, 0.5, 1.0):
        windows = CentreWindows(fraction).windows(*sizes()[1:])
        parts += [windows.x, windows.y, windows.width, windows.height]
    check("centre_windows", digest_of(*parts))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with train/ and val/: 72 PNG images of other sizes and three classes, the same on every machine."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(72):
        height, width = rng.integers(20, 61, 2)
        ramp = np.arange(width)[None, :, None] * (1 + number % 3) + np.arange(height)[:, None, None]
        pixels = (ramp + rng.integers(0, 64, (height, width, 3))) % 256
        folder = root / ("val" if number >= 54 else "train") / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
    return root


# Digits: whole epochs with evaluations, statistics taken anew, a short last step, warmup. Photos: files of all sizes,
# with dropout.
DIGITS = (
    *("--data", "digits", "--model", "resnet8", "--gpus", 5, "--per-gpu-batch", 64, "--last-batch", "keep"),
    *("--epochs", 4, "--steps", 9, "--warmup-epochs", 1, "--recompute-bn", 100, "--learning-rate", 0.05),
)
PHOTOS = (
    *("--model", "squeezenet1_1", "--image-size", 32, "--gpus", 4, "--per-gpu-batch", 5, "--epochs", 8),
    *("--steps", 6, "--label-smoothing", 0.1, "--learning-rate", 0.02, "--warmup-epochs", 1),
)
RUNS = {
    "digits, p = 1": ("digits", 1, DIGITS),
    "digits, p = 2": ("digits", 2, DIGITS),
    "photos, p = 1, torchvision": ("photos", 1, (*PHOTOS, "--loader", "torchvision")),
    "photos, p = 2, DALI": ("photos", 2, (*PHOTOS, "--loader", "dali")),
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="made on x86-64")
@pytest.mark.parametrize(("name", "processes", "options"), RUNS.values(), ids=RUNS)
def test_runs(
    name: str,
    processes: int,
    options: tuple[object, ...],
    start: Start,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, statistics, momentum, losses, errors and learning rates: one digest for every p and both loaders."""
    for variable, value in PORTABLE.items():
        monkeypatch.setenv(variable, value)
    data = ("--data", photos) if name == "photos" else ()
    finish(
        start(
            *("train", "--device", "cpu", "--reproducible", "--processes", processes, "--log-every", 1),
            *("--output", tmp_path / "run", *options, *data),
        )
    )
    last = tmp_path / "run" / "checkpoints" / "last"
    parts: list[Any] = []
    for file in ("model.safetensors", "optimizer.safetensors"):
        for key, tensor in sorted(load_file(last / file).items()):
            parts += [key, tensor]
    for record in records(tmp_path / "run"):
        parts.append(sorted(item for item in record.items() if item[0] not in NOT_DIGESTED))
    name = f"{name} (torch {torch.__version__.partition('+')[0]})"
    if "HVD_LB_GOLDEN" not in os.environ and name not in json.loads(DIGESTS.read_text()):
        pytest.skip(f"no digest has been made with torch {torch.__version__}, which may round otherwise")
    check(name, digest_of(*parts))
