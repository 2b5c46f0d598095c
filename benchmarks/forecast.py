"""Forecasts against real runs: hosts of a lab on this machine, whose links are shaped, and a profile of two of them.

For each rate `hvd-lb measure` writes the profile of *two* hosts. For each number of hosts the device is measured by
`simulate` on one of them, the step is foretold for that number from the two hosts' profile, and then measured in a real
run. Every host has a share of a core to itself, whatever the others do, as real hosts have: a control group's quota,
as four hosts on two cores would otherwise take them from each other. The speed of a shared machine changes within
minutes, which no forecast can know: a fixed piece of work is timed before, between and after the two, and where it took
unlike long they are done again. Prints each, the mean and the worst error, and how often the interval held. Needs root,
control groups and Horovod.

    python benchmarks/forecast.py [--rates 100mbit,300mbit,1gbit] [--hosts 1,2,3,4] [--rounds 1] [--model resnet20]
        [--images 32] [--steps 150] [--cores 0.45] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parents[1] / "tests"),
    str(Path(__file__).parents[1] / "tests" / "cluster"),
]

from hosts import Host, lab  # noqa: E402
from real_runs import until  # noqa: E402

from hvd_lb.forecast.pages import read_forecast  # noqa: E402
from hvd_lb.forecast.predict import Estimate  # noqa: E402
from hvd_lb.report.metrics import read_metrics  # noqa: E402

HVD_LB = Path(sys.executable).with_name("hvd-lb")
_PERIOD = 5000  # µs of a quota: short beside a step
_STEADY = 1.1  # how unlike the machine's speed may be from a forecast to the run's end
_MOST_TRIES = 5
_WORK = """
import time, numpy
matrix = numpy.ones((192, 192), numpy.float32)
began = time.perf_counter()
for _ in range(1500):
    matrix @ matrix
print(time.perf_counter() - began)
"""


def options(arguments: argparse.Namespace, count: int) -> list[object]:
    return [
        *("--data", "digits", "--device", "cpu", "--model", arguments.model, "--gpus", count),
        *("--per-gpu-batch", arguments.images, "--threads", 1, "--together", 1, "--noise-scale", "off"),
    ]


class Group:
    """The control group of a host: all that runs on it, its sshd too."""

    def __init__(self, host: Host):
        root = Path("/sys/fs/cgroup")
        self._second = not (root / "cpu").is_dir()  # version 2
        self._folder = (root if self._second else root / "cpu") / f"hvd-lb-{os.getpid()}-{host.name}"
        self._folder.mkdir()
        self.processes = self._folder / "cgroup.procs"
        sshd = (host.folder / "sshd.pid").read_text().strip()
        host.run(["sh", "-c", 'echo "$1" > "$2"', "sh", sshd, self.processes])

    def limit(self, cores: float | None) -> None:
        """So many cores; None: what there is."""
        if self._second:
            (self._folder / "cpu.max").write_text(f"{round(cores * _PERIOD) if cores else 'max'} {_PERIOD}")
        else:
            (self._folder / "cpu.cfs_period_us").write_text(str(_PERIOD))
            (self._folder / "cpu.cfs_quota_us").write_text(str(round(cores * _PERIOD) if cores else -1))

    def close(self) -> None:
        for process in self.processes.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        until(lambda: not self.processes.read_text(), 10)
        self._folder.rmdir()


def inside(group: Group, command: Sequence[object]) -> list[object]:
    return ["sh", "-c", 'echo 0 > "$0"; exec "$@"', group.processes, *command]


def foretell(
    host: Host, group: Group, count: int, profile: Path, folder: Path, arguments: argparse.Namespace
) -> Estimate:
    """The seconds of a step."""
    command = [HVD_LB, "simulate", *options(arguments, count), "--budget", "10s", "--cluster", profile]
    host.run(inside(group, [*command, "--output", folder]))
    return read_forecast(folder / "forecast.json").step


def measure(
    hosts: list[Host], groups: list[Group], folder: Path, arguments: argparse.Namespace
) -> tuple[list[float], str]:
    """Seconds of a step of a real run, in its records; and what the run says of the forecast beside it.

    Processes start with the cores that there are.
    """
    words = [
        *("--steps", arguments.steps, "--epochs", 50, "--log-every", 10, "--eval-every", "never"),
        *("--checkpoint-every", "never", "--output", folder, "--forecast", folder.parent / "forecast.json"),
    ]
    if len(hosts) > 1:
        words += ["--hosts", ",".join(f"{host.name}:1" for host in hosts)]
    command = inside(groups[0], [HVD_LB, "train", *options(arguments, len(hosts)), *words])
    for group in groups:
        group.limit(None)
    run = hosts[0].start(command, stdout=subprocess.PIPE)
    until(lambda: run.poll() is not None or len(_records(folder)) > 0, 120)
    for group in groups:
        group.limit(arguments.cores)
    begun = len(_records(folder)) + 1
    said, _ = run.communicate(timeout=300)
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}")
    seconds = [
        len(hosts) * arguments.images / record["images_per_second"] for record in _records(folder)[begun:]
    ]
    return seconds, next((line for line in said.splitlines() if "was foretold" in line), "")


def steadily(
    hosts: list[Host], groups: list[Group], profile: Path, place: Path, arguments: argparse.Namespace
) -> tuple[Estimate, list[float], int]:
    """A forecast and what a run measured, between which this machine was equally fast; and the tries it took."""
    for tries in range(1, _MOST_TRIES + 1):
        folder = place / str(tries)
        speeds = [speed(hosts[0], groups[0])]
        step = foretell(hosts[0], groups[0], len(hosts), profile, folder, arguments)
        speeds.append(speed(hosts[0], groups[0]))
        seconds, said = measure(hosts, groups[: len(hosts)], folder / "run", arguments)
        speeds.append(speed(hosts[0], groups[0]))
        if arguments.verbose:
            print([f"{one:.2f} s" for one in speeds], said, flush=True)
        if max(speeds) <= _STEADY * min(speeds):
            return step, seconds, tries
    raise SystemExit(f"the speed of this machine changes too much: {speeds} s for the same work")


def speed(host: Host, group: Group) -> float:
    """Of this machine now: seconds for a fixed piece of work."""
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return float(host.run(inside(group, [sys.executable, "-c", _WORK]), env=one_thread).stdout)


def _records(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [record for record in read_metrics(file) if record["kind"] == "train"] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="100mbit,300mbit,1gbit")
    parser.add_argument("--hosts", default="1,2,3,4")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", type=float, default=0.45, help="of each host")
    parser.add_argument("--verbose", action="store_true", help="profiles, and where each run says errors are")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.hosts.split(",")]
    found, again = [], 0
    with (
        tempfile.TemporaryDirectory() as name,
        lab([f"h{number + 1}" for number in range(max(2, *counts))]) as hosts,
        ExitStack() as stack,
    ):
        groups = [Group(host) for host in hosts]
        for group in groups:
            stack.callback(group.close)
            group.limit(arguments.cores)
        for rate in arguments.rates.split(","):
            folder = Path(name, rate)
            folder.mkdir()
            for host in hosts:
                host.slow_down(rate)
            profile = folder / "two.yaml"
            two = ["--hosts", "h1:1,h2:1", "--device", "cpu", "--output", folder / "runs"]
            hosts[0].run(inside(groups[0], [HVD_LB, "measure", profile, *two]), timeout=300)
            if arguments.verbose:
                print(profile.read_text())
            for count in counts:
                told: list[Estimate] = []
                seen: list[float] = []
                for turn in range(arguments.rounds):
                    place = folder / f"{count}-{turn}"
                    step, seconds, tries = steadily(hosts[:count], groups, profile, place, arguments)
                    told.append(step)
                    seen += seconds
                    again += tries - 1
                value, low, high = (
                    statistics.mean(getattr(one, what) for one in told) for what in ("value", "low", "high")
                )
                mean = statistics.fmean(seen)
                off, held = value / mean - 1, low <= mean <= high
                print(
                    f"{rate:>8} {count} hosts: foretold {1000 * value:7.1f} ms ({1000 * low:.1f} to {1000 * high:.1f})"
                    f", measured {1000 * mean:7.1f} ms, {100 * off:+6.1f} %{'' if held else ', outside'}",
                    flush=True,
                )
                found.append({"rate": rate, "hosts": count, "off": off, "held": held, "measured": mean})
    errors = [abs(one["off"]) for one in found]
    print(
        f"mean error {100 * statistics.mean(errors):.1f} %, worst {100 * max(errors):.1f} %; intervals held "
        f"{sum(one['held'] for one in found)} of {len(found)}; {again} pairs of forecast and run were done again"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
