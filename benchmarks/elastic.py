"""What it costs that a run is elastic, or audited, while nothing happens: `python benchmarks/elastic.py [audit]`.

The same run of two processes, one thread each, with the option and without, in turns: `--elastic` with both engines,
float and reproducible; `--audit 1` with 1, 2 and 8 virtual workers on each process, of which one more is computed
in each step. Told are the median milliseconds of a step, by the images per second that the runs record, and the ratio;
of audited runs also the one of microbatches on the busiest process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from limited import run_limited

PROCESSES, IMAGES, LOG_EVERY, WARM_UP = 2, 16, 5, 10
RUN = (
    *("train", "--data", "digits", "--model", "resnet18", "--device", "cpu", "--threads", "1"),
    *("--image-size", "64", "--processes", str(PROCESSES)),
    *("--per-gpu-batch", str(IMAGES), "--together", "1", "--learning-rate", "0.001", "--epochs", "100"),
    *("--eval-every", "never", "--checkpoint-every", "never", "--log-every", str(LOG_EVERY)),
)
WORKERS = (1, 2, 8)


def step_seconds(options: tuple[str, ...], workers: int, steps: int) -> list[float]:
    """Of each few steps of a run with so many virtual workers on each process, without the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        gpus = PROCESSES * workers
        words = [*RUN, *options, "--gpus", str(gpus), "--steps", str(steps), "--output", str(output)]
        _, errors, failure = run_limited([sys.executable, "-m", "hvd_lb_cli.main", *words], 300)
        if failure:
            raise SystemExit(f"hvd-lb {' '.join(words)}: {failure}: {errors.strip()[-500:]}")
        lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, filter(None, lines)) if record["kind"] == "train"]
    return [gpus * IMAGES / record["images_per_second"] for record in records if record["step"] >= WARM_UP]


def compare(
    option: tuple[str, ...], others: tuple[str, ...], workers: int, arguments: argparse.Namespace
) -> str:
    """With the option, without it, and how much longer that takes."""
    sides: dict[str, tuple[str, ...]] = {" ".join(option): option, "without": ()}
    found: dict[str, list[float]] = {side: [] for side in sides}
    steps = max(WARM_UP + 3 * LOG_EVERY, arguments.steps // workers)
    for _ in range(arguments.rounds):
        for side, words in sides.items():
            found[side] += step_seconds((*words, *others), workers, steps)
    with_it, without = (1000 * statistics.median(seconds) for seconds in found.values())
    return f"{' '.join(option)} {with_it:.1f} ms, without {without:.1f} ms; {with_it / without:.3f} times as long"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("elastic", "audit"), default="elastic")
    parser.add_argument("--engines", nargs="+", default=["horovod", "torch"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    if arguments.what == "audit":
        for workers in WORKERS:
            told = compare(("--audit", "1"), ("--reproducible",), workers, arguments)
            print(
                f"{PROCESSES * workers} virtual workers: {told} ({1 + 1 / workers:.3f} of microbatches)",
                flush=True,
            )
        return
    for engine in arguments.engines:
        for mode in ((), ("--reproducible",)):
            told = compare(("--elastic",), (*mode, "--engine", engine), 1, arguments)
            print(f"{engine}{' '.join(('', *mode))}: {told}", flush=True)


if __name__ == "__main__":
    main()
