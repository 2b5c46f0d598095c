"""What a run costs beside its training: metrics, digests, the noise scale, checkpoints, and showing progress.

An epoch of resnet18, one process of one thread, 100 steps of 16 images of 64×64: as `hvd-lb train` does
them by default, and by the same trainer that tells nobody and saves nothing, in turns. With so short an epoch records,
digests and checkpoints come far more often than in a real run. Then what the launching process, the head and the agent
take meanwhile, in a run of `hvd-lb train`.

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

IMAGES, STEPS, PIXELS = 16, 100, 64
FIELDS: dict[str, Any] = {
    "model": "resnet18", "image_size": PIXELS, "gpus": 1, "per_gpu_batch": IMAGES, "learning_rate": 1e-4,
    "epochs": 1, "warmup_epochs": 0, "threads": 1, "eval_every": "never",
}  # fmt: skip
SILENT: dict[str, Any] = {"log_every": STEPS, "digest_every": "never", "noise_scale": "off"}
RANK, WATCHED_SECONDS = "hvd_lb.launch.rank.entry", 15.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder) / "warm-up", True)
        for turn in range(arguments.turns):
            for told in (True, False) if turn % 2 else (False, True):
                found[told].append(fit(Path(folder) / str(turn), told))
        beside = launcher(Path(folder) / "run")
    (wall, cpu), (silent_wall, silent_cpu) = (
        [1000 * statistics.median(of) / STEPS for of in zip(*found[told], strict=True)]
        for told in (True, False)
    )
    row = {
        "name": "metrics, digests, noise scale and checkpoints",
        "milliseconds": wall,
        "silent_milliseconds": silent_wall,
        "ratio": wall / silent_wall,
        "cpu_ratio": cpu / silent_cpu,
        "launcher_share_of_a_core": beside,
    }
    print(
        f"a step: {wall:.1f} ms as by default, {silent_wall:.1f} ms silent: {row['ratio']:.3f} of the time, "
        f"{row['cpu_ratio']:.3f} of the CPU time; launching process, agent and head: {100 * beside:.1f} % of a core"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=1))


def fit(output: Path, told: bool) -> tuple[float, float]:
    """Wall and CPU seconds of all steps, and of what belongs to them."""
    train, val = (
        ArrayImages(
            np.zeros((count, PIXELS, PIXELS), np.uint8), np.arange(count) % 10, list("abcdefghij"), "-"
        )
        for count in (IMAGES * STEPS, IMAGES)
    )
    recipe, run = Recipe(**FIELDS, **({} if told else SILENT)), RunDirectory(output)
    if told:
        run.logs.mkdir(parents=True)
    observer = RunObserver(run, 0) if told else SilentObserver()
    trainer = Trainer(
        recipe, Dataset("-", train, val), Solo(), device=torch.device("cpu"), threads=1, observer=observer,
        store=CheckpointStore(run.checkpoints, 3, metadata_of(recipe, train.classes)) if told else None,
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
