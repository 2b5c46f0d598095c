"""From the command line to the end of the first step: `hvd-lb train`, and a stock Horovod script by `horovodrun`.

Two processes of one thread each, resnet18 of 64×64, 8 images each, from a folder of JPEG files whose headers have been
read before; the two take turns. CPU is that of all processes together up to that moment, so that a busy machine hardly
changes it.

    python benchmarks/first_step.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

_MODEL, _SIZE, _SECONDS = "resnet18", 64, 300
_PEER = Path(__file__).with_name("peers") / "first_step.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: processes that leave their parent stay ours
    seconds: dict[str, list[tuple[float, float]]] = {"hvd-lb": [], "stock Horovod": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _make_images(root / "data")
        sides = {"hvd-lb": _ours, "stock Horovod": _theirs}
        _ours(root, "first")  # reads the headers
        for number in range(arguments.rounds):
            for name, side in sides.items():
                seconds[name].append(side(root, str(number)))
                wall, cpu = seconds[name][-1]
                print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU", flush=True)
    middle = {
        name: [statistics.median(of) for of in zip(*found, strict=True)] for name, found in seconds.items()
    }
    (wall, cpu), (their_wall, their_cpu) = middle["hvd-lb"], middle["stock Horovod"]
    row = {
        "name": "command line to first step",
        "seconds": wall,
        "peer_seconds": their_wall,
        "ratio": wall / their_wall,
        "cpu_seconds": cpu,
        "peer_cpu_seconds": their_cpu,
        "cpu_ratio": cpu / their_cpu,
    }
    print(f"hvd-lb / stock Horovod: {row['ratio']:.2f} of the time, {row['cpu_ratio']:.2f} of the CPU time")
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=1))


def _make_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 8)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                levels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(levels).resize((160, 120)).save(folder / split / name / f"{number}.jpg")


def _ours(root: Path, number: str) -> tuple[float, float]:
    run = root / f"run-{number}"
    command = [
        "-m",
        "hvd_lb_cli.main",
        "train",
        "--data",
        root / "data",
        "--model",
        _MODEL,
        "--image-size",
        _SIZE,
    ]
    command += ["--gpus", 2, "--per-gpu-batch", 8, "--device", "cpu", "--threads", 1, "--log-every", 1]
    metrics = run / "metrics.jsonl"
    return _until(
        [sys.executable, *map(str, [*command, "--output", run])],
        lambda: metrics.exists() and '"train"' in metrics.read_text(),
        root / f"ours-{number}.log",
    )


def _theirs(root: Path, number: str) -> tuple[float, float]:
    horovodrun = Path(sys.executable).with_name("horovodrun")
    log = root / f"theirs-{number}.log"
    command = [horovodrun, "-np", 2, sys.executable, _PEER, root / "data", _MODEL, _SIZE]
    return _until(list(map(str, command)), lambda: "first step" in log.read_text(), log)


def _until(command: list[str], done: Callable[[], bool], log: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command until `done`; it is killed then."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while not done():
                if process.poll() is not None or time.monotonic() - began > _SECONDS:
                    raise SystemExit(f"{command[0]} took no step: {log.read_text()}")
                time.sleep(0.02)
            return time.monotonic() - began, sum(map(_cpu_seconds, _descendants()))
        finally:
            for descendant in _descendants():
                descendant.send_signal(signal.SIGKILL)
            with suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, 0)


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        return sum(process.cpu_times()[:4])  # its own, and of those it has waited for
    return 0.0


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


if __name__ == "__main__":
    main()
