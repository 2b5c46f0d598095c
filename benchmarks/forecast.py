"""Forecasts against real runs: hosts of a lab on this machine, whose links are shaped, and a profile of two of them.

For each rate `hvd-lb measure` writes the profile of *two* hosts. For each number of hosts the device is measured by
`simulate` on as many hosts at once, so that it shares this machine's cores as the run will, with one thread a rank; the
step is foretold for that number from the two hosts' profile, and then measured in a real run. This is done in rounds,
as the speed of a shared machine changes within minutes, and what hosts and rounds say is averaged. Prints each, the
mean and the worst error, and how often the interval held. Needs root, and Horovod.

    python benchmarks/forecast.py [--rates 100mbit,300mbit,1gbit] [--hosts 1,2,3,4] [--rounds 2] [--model resnet20]
        [--images 32] [--steps 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1] / "tests"),
    str(Path(__file__).parents[1] / "tests" / "cluster"),
]

from hosts import Host, lab  # noqa: E402

from hvd_lb.forecast.pages import read_forecast  # noqa: E402
from hvd_lb.forecast.predict import Estimate  # noqa: E402
from hvd_lb.report.metrics import read_metrics  # noqa: E402

HVD_LB = Path(sys.executable).with_name("hvd-lb")


def options(arguments: argparse.Namespace, count: int) -> list[object]:
    return [
        *("--data", "digits", "--device", "cpu", "--model", arguments.model, "--gpus", count),
        *("--per-gpu-batch", arguments.images, "--threads", 1, "--together", 1, "--noise-scale", "off"),
    ]


def foretell(hosts: list[Host], profile: Path, folder: Path, arguments: argparse.Namespace) -> list[Estimate]:
    """The seconds of a step, as all hosts foretell them at once."""
    command = [HVD_LB, "simulate", *options(arguments, len(hosts)), "--budget", "10s", "--cluster", profile]
    running = [
        host.start([*command, "--output", folder / host.name], stdout=subprocess.DEVNULL) for host in hosts
    ]
    statuses = [process.wait(120) for process in running]
    if any(statuses):
        raise SystemExit("a rehearsal failed")
    return [read_forecast(folder / host.name / "forecast.json").step for host in hosts]


def measure(hosts: list[Host], folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Seconds of a step of a real run, of each of its records but the first."""
    names = ",".join(f"{host.name}:1" for host in hosts)
    where = ["--hosts", names] if len(hosts) > 1 else []
    words = [
        "--steps",
        arguments.steps,
        "--log-every",
        5,
        "--eval-every",
        "never",
        "--checkpoint-every",
        "never",
    ]
    run = folder / f"run-{len(hosts)}"
    hosts[0].run(
        [HVD_LB, "train", *options(arguments, len(hosts)), *where, *words, "--epochs", 20, "--output", run],
        timeout=300,
    )
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    return [len(hosts) * arguments.images / record["images_per_second"] for record in records[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="100mbit,300mbit,1gbit")
    parser.add_argument("--hosts", default="1,2,3,4")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.hosts.split(",")]
    found = []
    with (
        tempfile.TemporaryDirectory() as name,
        lab([f"h{number + 1}" for number in range(max(counts))]) as hosts,
    ):
        for rate in arguments.rates.split(","):
            folder = Path(name, rate)
            folder.mkdir()
            for host in hosts:
                host.slow_down(rate)
            profile = folder / "two.yaml"
            two = ["--hosts", "h1:1,h2:1", "--device", "cpu", "--output", folder / "runs"]
            hosts[0].run([HVD_LB, "measure", profile, *two], timeout=300)
            for count in counts:
                told: list[Estimate] = []
                seen: list[float] = []
                for turn in range(arguments.rounds):
                    place = folder / f"{count}-{turn}"
                    told += foretell(hosts[:count], profile, place, arguments)
                    seen += measure(hosts[:count], place, arguments)
                value, low, high = (
                    statistics.mean(getattr(one, what) for one in told) for what in ("value", "low", "high")
                )
                seconds = statistics.median(seen)
                off, held = value / seconds - 1, low <= seconds <= high
                print(
                    f"{rate:>8} {count} hosts: foretold {1000 * value:7.1f} ms ({1000 * low:.1f} to {1000 * high:.1f})"
                    f", measured {1000 * seconds:7.1f} ms, {100 * off:+6.1f} %{'' if held else ', outside'}",
                    flush=True,
                )
                found.append({"rate": rate, "hosts": count, "off": off, "held": held, "measured": seconds})
    errors = [abs(one["off"]) for one in found]
    print(
        f"mean error {100 * statistics.mean(errors):.1f} %, worst {100 * max(errors):.1f} %; intervals held "
        f"{sum(one['held'] for one in found)} of {len(found)}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
