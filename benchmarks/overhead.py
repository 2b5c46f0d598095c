"""What a run costs beside its training: metrics, checkpoints with digests, and showing progress.

40 steps of resnet18, 16 images of 64×64 each, one process of one thread: by a trainer that tells nobody and saves
nothing; with metrics each 10 steps, as `hvd-lb train` has them; and with a digest and a checkpoint as well, at the end,
which are waited for. All in turns. Then what the launching process, the head and the agent take meanwhile, in a run of
`hvd-lb train`.

    python benchmarks/overhead.py [--turns 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import RunObserver, SilentObserver
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.trained.weights import metadata_of
from hvd_lb.training.checkpoint import CheckpointStore
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

IMAGES, STEPS, PIXELS = 16, 40, 64
FIELDS: dict[str, Any] = {
    "model": "resnet18", "image_size": PIXELS, "gpus": 1, "per_gpu_batch": IMAGES, "learning_rate": 1e-4,
    "epochs": 1, "warmup_epochs": 0, "threads": 1, "eval_every": "never",
}  # fmt: skip
# Sides: which fields they change, whether anybody is told, whether there is a checkpoint.
SIDES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "silent": ({"log_every": STEPS, "digest_every": "never"}, False, False),
    "metrics": ({"log_every": 10, "digest_every": "never"}, True, False),
    "and a checkpoint": ({"log_every": 10}, True, True),
}
RANK, WATCHED_SECONDS = "hvd_lb.launch.rank.entry", 15.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder) / "warm-up", "and a checkpoint")
        for turn in range(arguments.turns):
            for side in list(SIDES)[:: -1 if turn % 2 else 1]:
                found[side].append(fit(Path(folder) / f"{turn}-{side}", side))
        beside = launcher(Path(folder) / "run")
    wall, cpu = (
        {side: statistics.median(took[which] for took in of) for side, of in found.items()}
        for which in (0, 1)
    )
    row = {
        "name": "metrics; a checkpoint with its digest; the launching process, head and agent",
        "metrics_ratio": wall["metrics"] / wall["silent"],
        "metrics_cpu_ratio": cpu["metrics"] / cpu["silent"],
        "checkpoint_seconds": wall["and a checkpoint"] - wall["metrics"],
        "checkpoint_cpu_seconds": cpu["and a checkpoint"] - cpu["metrics"],
        "launcher_share_of_a_core": beside,
    }
    print(
        f"{STEPS} steps: {wall['silent']:.2f} s; with metrics {row['metrics_ratio']:.3f} times as long, "
        f"{row['metrics_cpu_ratio']:.3f} times the CPU; a checkpoint with its digest "
        f"{row['checkpoint_seconds']:.2f} s, {row['checkpoint_cpu_seconds']:.2f} s of CPU; "
        f"launching process, head and agent {100 * beside:.1f} % of a core"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=1))


def fit(output: Path, side: str) -> tuple[float, float]:
    """Wall and CPU seconds of all steps, and of what belongs to them."""
    train, val = (
        ArrayImages(
            np.zeros((count, PIXELS, PIXELS), np.uint8), np.arange(count) % 10, list("abcdefghij"), "-"
        )
        for count in (IMAGES * STEPS, IMAGES)
    )
    fields, told, saved = SIDES[side]
    recipe, run = Recipe(**FIELDS, **fields), RunDirectory(output)
    if told:
        run.logs.mkdir(parents=True)
    observer = RunObserver(run, 0) if told else SilentObserver()
    trainer = Trainer(
        recipe, Dataset("-", train, val), Solo(), device=torch.device("cpu"), threads=1, observer=observer,
        store=CheckpointStore(run.checkpoints, 3, metadata_of(recipe, train.classes)) if saved else None,
    )  # fmt: skip
    began, cpu_began = time.perf_counter(), time.process_time()
    trainer.fit()
    observer.close()
    return time.perf_counter() - began, time.process_time() - cpu_began


def launcher(output: Path) -> float:
    """The share of a core that all processes of a run take which are no rank, while it trains."""
    command = [sys.executable, "-m", "hvd_lb_cli.main", "train", "--data", "digits", "--device", "cpu"]
    command += ["--processes", "1", "--threads", "1", "--eval-every", "never", "--output", str(output)]
    for name in ("model", "image_size", "gpus", "per_gpu_batch"):
        command += [f"--{name.replace('_', '-')}", str(FIELDS[name])]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        metrics, end = output / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"hvd-lb train took no step: {process.stderr.read().decode()}")
            time.sleep(0.2)
        others = [process, *(of for of in process.children(recursive=True) if RANK not in of.cmdline())]
        before, began = _cpu_seconds(others), time.monotonic()
        time.sleep(WATCHED_SECONDS)
        return (_cpu_seconds(others) - before) / (time.monotonic() - began)
    finally:
        process.terminate()  # it stops with a checkpoint
        process.communicate()


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    main()
