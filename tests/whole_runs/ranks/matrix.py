"""Run by test_matrix.py in every process of a job: trains each model in both modes and saves what came of it.

`python matrix.py FOLDER` alone is p = 1.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import hvd_lb.world
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.optim.state_dict import flatten_state
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World

# With batch norm; with batch norm and dropout; without batch norm, with dropout; with stochastic depth. In pixels.
MODELS = {"resnet20": 16, "mobilenet_v3_small": 64, "squeezenet1_1": 32, "efficientnet_b0": 32}
MODES = {"float": False, "reproducible": True}
# So few images and such small maps make it chaotic: rounding grows a billionfold in ten steps.
ONLY_REPRODUCIBLE = {"efficientnet_b0"}
STEPS = 10


class Losses(SilentObserver):
    def __init__(self) -> None:
        self.of: list[float] = []
        self.repeated: list[int] = []

    def train(self, record: dict) -> None:
        self.of.append(record["loss"])

    def repeat(self, record: dict) -> None:
        self.repeated.append(record["step"])


def noise(images: int, val: int) -> Dataset:
    """Coloured noise, in 10 classes that differ in brightness: no map is dead, so no rounding decides about a ReLU."""
    rng = np.random.default_rng(0)

    def split(count: int) -> ArrayImages:
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(0, 130, (count, 32, 32, 3)) + 13 * labels[:, None, None, None]
        return ArrayImages(pixels.astype(np.uint8), labels, list("abcdefghij"), "noise")

    return Dataset("noise", split(images), split(val))


def train(model: str, reproducible: bool, world: World) -> tuple[Trainer, Losses]:
    """k = 9 is divided unevenly among 8 processes; 100 images end an epoch with 19 for 9 workers of 3."""
    recipe = Recipe(
        model=model, image_size=MODELS[model], eval_crop=1.0, crop_scale=(0.6, 1.0), gpus=9,
        per_gpu_batch=3, last_batch="keep", epochs=5, steps=STEPS, warmup="none", zero_gamma=False, log_every=1,
        learning_rate=0.002, eval_every="4steps", recompute_bn=20 if model == "mobilenet_v3_small" else None,
        reproducible=reproducible,
    )  # fmt: skip
    losses = Losses()
    data = noise(100, 41)
    trainer = Trainer(recipe, data, world, device=torch.device("cpu"), threads=1, observer=losses)
    trainer.fit()
    trainer.state.statistics.publish(trainer.step)
    return trainer, losses


def overflow(world: World) -> dict:
    """A short step of 3 images for 9 workers, in which the statistics' scales are far too fine; what came of it."""
    recipe = Recipe(
        model="resnet8", image_size=8, gpus=9, per_gpu_batch=3, last_batch="keep", epochs=2, warmup="none", log_every=1,
        learning_rate=0.002, eval_every="never", reproducible=True,
    )  # fmt: skip
    losses = Losses()
    trainer = Trainer(recipe, noise(30, 9), world, device=torch.device("cpu"), threads=1, observer=losses)
    take_step = trainer.train_step

    def sabotaged(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        if trainer.step == 1 and not losses.repeated:
            trainer.state.statistics.exponents = [
                exponent + 30 for exponent in trainer.state.statistics.exponents
            ]
        return take_step(batches)

    trainer.train_step = sabotaged
    trainer.fit()
    return {"repeated": losses.repeated, "losses": losses.of}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = hvd_lb.world.init()
    result = overflow(world)
    if world.rank == 0:
        (folder / "overflow.json").write_text(json.dumps(result))
    for model in MODELS:
        for mode, reproducible in MODES.items():
            if model in ONLY_REPRODUCIBLE and not reproducible:
                continue
            trainer, losses = train(model, reproducible, world)
            tensors, skeleton = flatten_state(trainer.state.optimizer.state_dict())
            tensors |= {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
            digest = hashlib.sha256()
            for name, tensor in sorted(tensors.items()):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
            rate = trainer.state.optimizer.param_groups[0]["lr"]
            for number, state in trainer.state.optimizer.state_dict()["state"].items():
                # In terms of the last rate, as plain updates keep it and fused ones do not.
                tensors[f"state/{number}/velocity"] = state["velocity"] * (rate / state["reference_lr"])
            evaluation = asdict(trainer.state.last_evaluation) if trainer.state.last_evaluation else None
            result = {
                "digest": digest.hexdigest(),
                "optimizer": skeleton,
                "evaluation": evaluation,
                "losses": losses.of,
            }
            if world.rank == 0:
                (folder / f"{model}-{mode}.json").write_text(json.dumps(result))
                save_file(
                    {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
                    folder / f"{model}-{mode}.safetensors",
                )
    hvd_lb.world.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
