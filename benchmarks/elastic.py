"""What it costs that a run is elastic, while nothing happens: `python benchmarks/elastic.py`.

The same run of two processes, one thread each, with `--elastic` and without, in turns; both engines, float and
reproducible. Told are the median milliseconds of a step, by the images per second that the runs record, and the ratio.
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
    *("--image-size", "64", "--gpus", str(PROCESSES), "--processes", str(PROCESSES)),
    *("--per-gpu-batch", str(IMAGES), "--together", "1", "--learning-rate", "0.001", "--epochs", "100"),
    *("--eval-every", "never", "--checkpoint-every", "never", "--log-every", str(LOG_EVERY)),
)
SIDES: dict[str, tuple[str, ...]] = {"elastic": ("--elastic",), "not": ()}


def step_seconds(options: tuple[str, ...], steps: int) -> list[float]:
    """Of each few steps of a run, without the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        words = [*RUN, *options, "--steps", str(steps), "--output", str(output)]
        _, errors, failure = run_limited([sys.executable, "-m", "hvd_lb_cli.main", *words], 300)
        if failure:
            raise SystemExit(f"hvd-lb {' '.join(words)}: {failure}: {errors.strip()[-500:]}")
        lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, filter(None, lines)) if record["kind"] == "train"]
    return [
        PROCESSES * IMAGES / record["images_per_second"] for record in records if record["step"] >= WARM_UP
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["horovod", "torch"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    for engine in arguments.engines:
        for mode in ((), ("--reproducible",)):
            found: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(arguments.rounds):
                for side, options in SIDES.items():
                    found[side] += step_seconds((*options, *mode, "--engine", engine), arguments.steps)
            medians = {side: 1000 * statistics.median(seconds) for side, seconds in found.items()}
            figures = ", ".join(f"{side} {ms:.1f} ms" for side, ms in medians.items())
            ratio = medians["elastic"] / medians["not"]
            print(f"{engine}{' '.join(('', *mode))}: {figures}; {ratio:.3f} times as long", flush=True)


if __name__ == "__main__":
    main()
