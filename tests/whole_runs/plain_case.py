"""The run on which hvd-lb and plain.py are compared, and what plain.py makes of it.

1,438 digits in steps of 7 × 41 = 287 images, so that the learning rate is scaled and warms up; the sixth step of an
epoch has 3 images, one each for workers 2, 4 and 6. In 18 steps the learning rate changes six times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvd_lb.report.metrics import SilentObserver
from hvd_lb.resolve import resolve
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

PROGRAM = Path(__file__).with_name("plain.py")
EXACT = 1e-12

# The fields of the recipe; other than these only the preset for digits has a say.
SETTINGS: dict[str, Any] = {
    "data": "digits", "model": "resnet8", "precision": "fp64", "gpus": 7, "per_gpu_batch": 41, "epochs": 3,
    "last_batch": "keep", "learning_rate": 0.2, "schedule": "step", "warmup_epochs": 0.5, "momentum": 0.9,
    "weight_decay": 5e-4, "bn_momentum": 0.1, "flip": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Where plain.py is after `len(losses)` steps, by the names of hvd-lb's state dict; momentum is form 9's u."""

    weights: dict[str, Tensor]
    statistics: dict[str, Tensor]
    momentum: dict[str, Tensor]
    losses: list[float]
    learning_rates: list[float]


def make_trainer(**changes: Any) -> Trainer:
    """The run on this process alone, at its first step."""
    resolved = resolve({**SETTINGS, **changes}, recipe=None, default_gpus=1)
    return Trainer(
        resolved.recipe,
        resolved.dataset,
        Solo(),
        device=torch.device("cpu"),
        threads=1,
        observer=SilentObserver(),
    )


def run_plain(folder: Path, steps: int) -> Reference:
    """Hands plain.py the initial weights and the images that hvd-lb's loader serves, and lets it take `steps` steps."""
    trainer = make_trainer(steps=steps)
    initial = {f"initial/{name}": tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with trainer.batches() as batches:
        images, labels = zip(*batches, strict=True)
    save_file({**initial, "images": torch.cat(images), "labels": torch.cat(labels)}, folder / "inputs")
    same = ("epochs", "learning_rate", "warmup_epochs", "momentum", "weight_decay", "bn_momentum")
    numbers = {name: SETTINGS[name] for name in same} | {"N": len(trainer.dataset.train), "steps": steps}
    numbers |= {"k": SETTINGS["gpus"], "n": SETTINGS["per_gpu_batch"]}
    (folder / "numbers").write_text(json.dumps(numbers))
    command = [sys.executable, PROGRAM, folder / "inputs", folder / "numbers", folder / "outputs"]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    outputs = load_file(folder / "outputs")

    def named(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): t for name, t in outputs.items() if name.startswith(kind)}

    return Reference(
        named("weights/"),
        named("statistics/"),
        named("momentum/"),
        outputs["losses"].tolist(),
        outputs["learning_rates"].tolist(),
    )


def velocity_names() -> list[str]:
    """The parameters in the order of the optimizer's groups, which number them in its state."""
    trainer = make_trainer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return [
        names[parameter] for group in trainer.state.optimizer.param_groups for parameter in group["params"]
    ]


def largest_difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Of any element of the `expected` tensors, absolute; NaN when any is."""
    return torch.stack([(found[name] - tensor).abs().max() for name, tensor in expected.items()]).max().item()
