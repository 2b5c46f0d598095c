"""What exactness costs: the reproducible mode against the float mode, and the float mode against a bare loop.

`python benchmarks/reproducible.py [--seconds S]` times whole steps of the trainer on the CPU, with batches that lie
ready in memory: first two Horovod processes, one thread each, that share the virtual workers, in both modes; then one
process with eight virtual workers (two of 224²) against forward, backward and torch's SGD over the same microbatches.
All sides take turns in one run. It prints medians and their ratios; and how long a checkpoint keeps training waiting.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from turns import Step, interleaved

import hvd_lb as lb
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.checkpoint import BackgroundWriter, CheckpointStore
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer

TURNS, WARM_UP = 15, 2
# Model, pixels, images of a virtual worker.
CASES = (("resnet20", 32, 32), ("resnet18", 64, 8), ("resnet18", 224, 8))


def trainer(model: str, pixels: int, images: int, gpus: int, reproducible: bool) -> Trainer:
    few = ArrayImages(
        np.zeros((8192, 8, 8), np.uint8), np.zeros(8192, np.int64), list("abcdefghij"), "nothing"
    )
    recipe = Recipe(
        model=model, image_size=pixels, gpus=gpus, per_gpu_batch=images, reproducible=reproducible, threads=1,
        together=1, learning_rate=1e-4,
    )  # fmt: skip
    made = Trainer(
        recipe, Dataset("nothing", few, few), lb.current(), device=torch.device("cpu"), threads=1,
        observer=SilentObserver(),
    )  # fmt: skip
    made.model.train()
    return made


def batches(images: int, pixels: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(images, 3, pixels, pixels), torch.randint(0, 10, (images,))) for _ in range(4)]


def whole_step(made: Trainer, ready: list[tuple[Tensor, Tensor]]) -> Step:
    endless = itertools.cycle(ready)

    def step() -> None:
        with made.kernels():
            made.train_step(endless)

    return step


def bare_step(model: str, gpus: int, ready: list[tuple[Tensor, Tensor]]) -> Step:
    network = build_model(model, 10, seed=0).train()
    optimizer = torch.optim.SGD(lb.parameter_groups(network), 1e-4, 0.9, nesterov=True, foreach=True)
    endless: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(ready)
    count = gpus * len(ready[0][1])

    def step() -> None:
        optimizer.zero_grad()
        for x, y in itertools.islice(endless, gpus):
            (F.cross_entropy(network(x), y, reduction="sum") / count).backward()
        optimizer.step()

    return step


def report(title: str, medians: dict[str, float]) -> None:
    if lb.current().rank == 0:
        ours, peer = medians
        figures = ", ".join(f"{name} {value:.1f} ms" for name, value in medians.items())
        print(f"{title}: {figures}; {ours} takes {medians[ours] / medians[peer]:.3f} of {peer}", flush=True)


def modes(seconds: float) -> None:
    """Two processes, one or two virtual workers each."""
    for model, pixels, images in CASES:
        ready = batches(images, pixels)
        for gpus in (2, 4):
            sides = {
                name: whole_step(trainer(model, pixels, images, gpus, reproducible), ready)
                for name, reproducible in (("reproducible", True), ("float", False))
            }
            title = f"{model}, {gpus} virtual workers × {images} images of {pixels}×{pixels}, 2 processes"
            report(title, interleaved(sides, TURNS, WARM_UP, seconds))


def virtual_workers(seconds: float) -> None:
    """One process."""
    for model, pixels, images in CASES:
        ready, gpus = batches(images, pixels), 8 if pixels < 224 else 2
        sides = {
            "float mode": whole_step(trainer(model, pixels, images, gpus, False), ready),
            "the bare loop": bare_step(model, gpus, ready),
        }
        report(
            f"{model}, {gpus} virtual workers × {images} images of {pixels}×{pixels}, 1 process",
            interleaved(sides, TURNS, WARM_UP, seconds),
        )


def checkpoints() -> None:
    """How long `save` keeps training waiting, and how long the thread goes on writing."""
    for model in ("resnet20", "resnet18", "resnet50"):
        weights = build_model(model, 1000, seed=0).state_dict()
        velocities = {f"velocity/{name}": tensor.clone() for name, tensor in weights.items()}
        with tempfile.TemporaryDirectory() as folder:
            stalls, wholes = [], []
            for step in range(5):
                writer = BackgroundWriter(CheckpointStore(Path(folder)))
                start = time.perf_counter()
                writer.save(step, weights, velocities, {})
                stalls.append(time.perf_counter() - start)
                writer.close()
                wholes.append(time.perf_counter() - start)
        size = sum(t.numel() * t.element_size() for t in (*weights.values(), *velocities.values())) / 1e6
        stall, whole = 1000 * statistics.median(stalls), 1000 * statistics.median(wholes)
        print(
            f"checkpoint of {model}, {size:.0f} MB: {stall:.1f} ms stall of {whole:.0f} ms; {stall / whole:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a case, about")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    if "HOROVOD_RANK" in os.environ:
        lb.init()
        modes(seconds)
        lb.shutdown()
        return
    horovodrun = Path(sys.executable).with_name("horovodrun")
    command = [horovodrun, "--gloo", "-np", "2", "-H", "localhost:2", "--network-interface", "lo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, sys.executable, *sys.argv], env=environment, check=True)
    lb.init()
    virtual_workers(seconds)
    checkpoints()
    lb.shutdown()


if __name__ == "__main__":
    main()
