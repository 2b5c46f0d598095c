"""Whole steps of two processes on this machine, one thread each: hvd-lb beside its peers, in one run.

    python benchmarks/end_to_end.py [--cases "resnet18 64²" ...] [--pictures] [--rounds 3] [--json results.json]

The peers are the plain programs in peers/: PyTorch's DDP over Gloo, Horovod's own optimizer, and the network's work
alone. Batches lie ready in memory; with `--pictures` they come from PNG files of 300×300, but for the last: by hvd-lb's
own loader, and for its peers by a DataLoader of one worker each, whose CPU seconds and memory are not in the figures.
`--stock-horovod FOLDER` names a Horovod for that peer (`pip install --target`), where the one here has a patch.
All sides take turns, each in processes of its own; figures are medians over the rounds, of the median step in each. A
side that fails in a case has none there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from limited import run_limited
from peers.steps import CASES
from PIL import Image

from hvd_lb.machine.cpu import describe_cpu, is_slow_in

BIN, PEERS = Path(sys.executable).parent, Path(__file__).with_name("peers")
HOROVODRUN = [BIN / "horovodrun", "--gloo", "-np", "2", "-H", "localhost:2", "--network-interface", "lo"]
TORCHRUN = [BIN / "torchrun", "--nproc-per-node", "2", "--no-python"]
# Program, launcher, fields of the recipe.
SIDES: dict[str, tuple[str, list[str | Path], dict[str, object]]] = {
    "hvd-lb": ("ours.py", HOROVODRUN, {}),
    "hvd-lb, torch": ("ours.py", TORCHRUN, {}),
    "hvd-lb, reproducible": ("ours.py", HOROVODRUN, {"reproducible": True}),
    "DDP": ("ddp.py", TORCHRUN, {}),
    "Horovod": ("stock_horovod.py", HOROVODRUN, {}),
    "bare": ("bare.py", TORCHRUN, {}),
    "hvd-lb, fp16": ("ours.py", HOROVODRUN, {"compress": "fp16"}),
    "hvd-lb, torch, fp16": ("ours.py", TORCHRUN, {"compress": "fp16"}),
    "hvd-lb, torch, bf16": ("ours.py", TORCHRUN, {"compress": "bf16"}),
    "DDP, fp16": ("ddp.py", TORCHRUN, {"compress": "fp16"}),
    "Horovod, fp16": ("stock_horovod.py", HOROVODRUN, {"compress": "fp16"}),
}
# Gradients in half precision on the wire: when asked for.
COMPRESSED = [side for side, (_, _, fields) in SIDES.items() if "compress" in fields]
PEERS_OF_ALL = ("DDP", "Horovod", "bare")


def run(side: str, case: str, stock_horovod: Path | None = None) -> list[float] | None:
    """Of a step: seconds, CPU seconds of a process, and its bytes of memory; None where it fails."""
    program, launcher, fields = SIDES[side]
    os.environ |= {"OMP_NUM_THREADS": "1", "HVD_LB_BENCH": json.dumps(fields)}
    command = [*map(str, launcher), sys.executable, str(PEERS / program), case]
    if stock_horovod and side.startswith("Horovod"):
        command = ["env", f"PYTHONPATH={stock_horovod}", *command]
    output, errors, failure = run_limited(command, 200)
    for line in output.splitlines():
        if "CASE " in line:
            return json.loads(line.partition("CASE ")[2])[1:]
    reasons = (errors or output).strip().splitlines() or [failure]
    print(f"  {side} failed: {reasons[-1][:200]}", flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, help="all, but for those in bf16 on a CPU that is slow in it"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=[side for side in SIDES if side not in COMPRESSED],
        help=f"not by default, with gradients in half precision on the wire: {', '.join(COMPRESSED)}",
    )
    parser.add_argument("--pictures", action="store_true", help="from files, not from memory")
    parser.add_argument(
        "--stock-horovod", type=Path, metavar="FOLDER", help="of the peer Horovod, where not ours"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.cases:
        slow = is_slow_in("bf16", describe_cpu())
        arguments.cases = [name for name, case in CASES.items() if not (case.bf16 and slow)]
        if slow:
            print("left out, as torch has only slow kernels for bf16 on this CPU:", end=" ")
            print(", ".join(name for name in CASES if name not in arguments.cases), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.pictures:
            make_pictures(Path(folder))
            os.environ |= {"HVD_LB_BENCH_PICTURES": folder, "HVD_LB_CACHE": f"{folder}/cache"}
        measure(arguments)


def make_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 1024), ("val", 16)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count // 2):
                rough = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
                levels = np.asarray(rough.resize((300, 300)), np.int16) + rng.normal(0, 8, (300, 300, 3))
                picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
                picture.save(folder / split / name / f"{number}.png")


def measure(arguments: argparse.Namespace) -> None:
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in arguments.cases:
        print(case, flush=True)
        found: dict[str, list[list[float]]] = {side: [] for side in arguments.sides}
        for _ in range(arguments.rounds):
            for side in list(found):
                if (result := run(side, case, arguments.stock_horovod)) is None:
                    del found[side]
                else:
                    found[side].append(result)
        results[case] = {
            side: dict(
                zip(
                    ("seconds", "cpu_seconds", "memory"),
                    map(statistics.median, zip(*runs, strict=True)),
                    strict=True,
                )
            )
            for side, runs in found.items()
        }
        for side, of in results[case].items():
            speed, cpu, memory = (
                2 * CASES[case].images / of["seconds"],
                1000 * of["cpu_seconds"],
                of["memory"] / 2**20,
            )
            ratios = [
                f"{peer['seconds'] / of['seconds']:.2f} of {name}'s speed"
                for name, peer in results[case].items()
                if name in PEERS_OF_ALL and name != side
            ]
            print(
                f"  {side + ':':22}{speed:6.1f} images/s, {cpu:.0f} ms of CPU, {memory:.0f} MB; {', '.join(ratios)}"
            )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
