"""What waiting for a sum costs: our `wait` beside `hvd.synchronize`.

`python benchmarks/waiting.py` starts two Horovod processes on the CPU and prints seconds of CPU per second of waiting
for a late process, and the median time of sums that nobody is late for, taken in turns, with their ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hvd_lb as lb

LATE_SECONDS, SUMS = 2.0, 300
Wait = Callable[[torch.Tensor, str], object]


def waiting(wait: Wait) -> float:
    """CPU seconds of this thread per second that it waits for rank 1."""
    lb.current().barrier()
    if lb.current().rank == 1:
        time.sleep(LATE_SECONDS)
    wall, cpu = time.perf_counter(), time.thread_time()
    wait(torch.ones(2), "late")
    return (time.thread_time() - cpu) / (time.perf_counter() - wall)


def in_turns(waits: dict[str, Wait], elements: int) -> dict[str, float]:
    """Median milliseconds of a sum, waited for in each of the ways."""
    times: dict[str, list[float]] = {name: [] for name in waits}
    tensor = torch.zeros(elements)
    for _ in range(SUMS):
        for name, wait in waits.items():
            began = time.perf_counter()
            wait(tensor, f"{elements}")
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    import horovod.torch as hvd

    world = lb.init()
    torch.set_num_threads(1)
    waits: dict[str, Wait] = {
        "hvd-lb": lambda tensor, name: world.allreduce_async(tensor, name).wait(),
        "hvd.synchronize": lambda tensor, name: hvd.synchronize(
            hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)
        ),
    }
    used = {name: waiting(wait) for name, wait in waits.items()}
    ours, theirs = used.values()
    if world.rank == 0:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in used.items())
        print(
            f"CPU seconds per second of waiting: {figures}; hvd-lb uses {ours / theirs:.3f} of theirs",
            flush=True,
        )
    for elements in (2, 10_000, 1_000_000):
        medians = in_turns(waits, elements)
        ours, theirs = medians.values()
        if world.rank == 0:
            figures = ", ".join(f"{name} {value:.3f} ms" for name, value in medians.items())
            print(f"a sum of {elements:,}: {figures}; hvd-lb takes {ours / theirs:.3f} of theirs", flush=True)
    lb.shutdown()


if __name__ == "__main__":
    if "HOROVOD_RANK" in os.environ:
        main()
    else:
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ).parse_args()
        launcher = Path(sys.executable).with_name("horovodrun")
        command = [launcher, "--gloo", "-np", "2", "-H", "localhost:2", "--network-interface", "lo"]
        subprocess.run([*command, sys.executable, __file__], check=True)
