"""What a whole run says of its network is what a program says that knows nothing of hvd-lb: PIL decodes, torchvision's
transforms cut and normalise, torchvision's network takes the weights of model.safetensors, and a plain loop counts.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from real_runs import Start, finish, records
from safetensors.torch import load_file
from torchvision.transforms import v2

pytestmark = pytest.mark.slow

CLASSES, SIZE, CROP = 12, 32, 0.8
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
RECIPE = (
    *("--model", "resnet18", "--image-size", 24, "--eval-size", SIZE, "--eval-crop", CROP),
    *("--crop-scale", "0.5,1", "--epochs", 2),
    *("--gpus", 2, "--per-gpu-batch", 8, "--learning-rate", 0.8, "--weight-decay", 0.001, "--device", "cpu"),
    *("--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD)), "--label-smoothing", 0.2),
    *("--on-bad-image", "skip", "--max-bad-images", 0.05, "--threads", 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes that differ in colour and grain: PNG and JPEG, upright, lying, square and long; 41 for validation,
    so that the last batch of 8 has one. One of them is broken.
    """
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12 * 8), ("val", 41)):
        for number in range(count):
            label = number % CLASSES
            width, height = ((50, 37), (33, 61), (40, 40), (120, 24), (21, 97), (64, 45))[rng.integers(6)]
            levels = np.array([100 + 12 * (label % 3), 90 + 12 * (label // 3), 120])
            grain = rng.integers(-60, 60, (height, width, 3)) + rng.integers(-12, 12, 3)
            picture = Image.fromarray((levels + grain).clip(0, 255).astype(np.uint8))
            place = root / split / f"class {label:02d}" / f"{number}.{('png', 'jpg')[number % 5 == 1]}"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
    broken = root / "val" / "class 05" / "17.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    return root


def oracle(folder: Path, weights: Path) -> dict[str, Any]:
    network = torchvision.models.resnet18(num_classes=CLASSES)
    network.load_state_dict(load_file(weights))
    network.eval()
    finish_crop = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize([SIZE, SIZE], antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    wrong, wrong_among_five, second, loss, count = 0, 0, 0, 0.0, 0
    names = sorted(path.name for path in (folder / "val").iterdir())
    for path in sorted((folder / "val").glob("*/*")):
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except OSError:
            continue
        side = round(CROP * min(picture.size))
        with torch.no_grad():
            scores = network(finish_crop(v2.functional.center_crop(picture, [side, side]))[None])[0].tolist()
        label = names.index(path.parent.name)
        ranking = sorted(range(CLASSES), key=lambda of: -scores[of])
        wrong += ranking[0] != label
        second += ranking[1] == label
        wrong_among_five += label not in ranking[:5]
        loss += math.log(sum(map(math.exp, scores))) - scores[label]
        count += 1
    # Else a fault in the one could not be told from the other.
    assert 0 < wrong_among_five < wrong - second < wrong < count, (wrong, wrong_among_five, second)
    return {
        "top1_error": 100 * wrong / count,
        "top5_error": 100 * wrong_among_five / count,
        "loss": loss / count,
        "images": count,
    }


@pytest.mark.parametrize(
    ("loader", "processes"),
    [
        ("torchvision", 1),
        pytest.param(
            "dali", 2, marks=pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")
        ),
    ],
)
def test_a_run_tells_what_plain_torchvision_finds(
    loader: str, processes: int, folder: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    more = ("--loader", loader, "--processes", processes, "--checkpoint-every", "1epoch", "--output", run)
    finish(start("train", "--data", folder, *RECIPE, *more))
    told = [record for record in records(run) if record["kind"] == "eval"]
    summary = json.loads((run / "summary.json").read_text())
    assert len(told) == 2
    for record in told:
        steps = record["step"] + 1
        found = oracle(folder, run / "checkpoints" / f"step-{steps:08d}" / "model.safetensors")
        assert found["images"] == 40
        for name, value in found.items():
            assert record[name] == pytest.approx(value, rel=1e-5, abs=1e-9), (name, record, found)
    assert (
        summary["final"].items()
        >= {key: told[-1][key] for key in ("top1_error", "top5_error", "loss")}.items()
    )
    best = min(told, key=lambda record: record["top1_error"])
    assert summary["best"]["top1_error"] == best["top1_error"]
