"""Adding up resnet18's gradients between two processes of this machine: in shared memory, and through an engine.

`python benchmarks/sums.py` starts two processes by horovodrun, by torchrun and, where there is one, by mpirun. In each
of these jobs shared memory and the engine (Horovod over Gloo, torch.distributed over Gloo, Horovod over Open MPI) take
turns with 11.7 million numbers in 11 tensors, fp32 as in the float mode and int64 as in the reproducible one. It prints
medians of the time of a sum of all, and of the CPU time that a process takes for it, with their ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import hvd_lb as lb
from hvd_lb.world.build import built_with

NUMBERS, TENSORS = 11_700_000, 11
TURNS, WARM_UP = 15, 3
BIN = Path(sys.executable).parent
JOBS: dict[str, list[str | Path]] = {
    "Horovod, Gloo": [
        BIN / "horovodrun",
        "--gloo",
        "-np",
        "2",
        "-H",
        "localhost:2",
        "--network-interface",
        "lo",
    ],
    "torch.distributed, Gloo": [BIN / "torchrun", "--nproc-per-node", "2", "--no-python"],
    # As hvd-lb starts it on one machine: who waits lets others run.
    "Horovod, Open MPI": ["mpirun", "--allow-run-as-root", "-np", "2", "--mca", "mpi_yield_when_idle", "1"],
}


def main() -> None:
    engine = os.environ["HVD_LB_BENCH"]
    world = lb.init()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.int64):
        count = NUMBERS // TENSORS
        names = [f"{dtype}.{number}" for number in range(TENSORS)]
        sides = {
            "memory": [world.room(name, count, dtype, torch.device("cpu")) for name in names],
            engine: [torch.zeros(count, dtype=dtype) for _ in names],
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        used: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(WARM_UP + TURNS):
            for side, tensors in sides.items():
                for tensor in tensors:
                    tensor.fill_(world.rank + 1)
                world.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                add_up(world, tensors, names)
                if turn >= WARM_UP:
                    seconds[side].append(1000 * (time.perf_counter() - wall))
                    used[side].append(1000 * (time.process_time() - cpu))
                assert all(bool((tensor == 3).all()) for tensor in tensors)
        if world.rank == 0:
            report(f"{NUMBERS * dtype.itemsize / 1e6:.0f} MB of {dtype}", seconds, used)
    lb.shutdown()


def add_up(world: lb.World, tensors: list[Tensor], names: list[str]) -> None:
    for handle in [world.allreduce_async(tensor, name) for tensor, name in zip(tensors, names, strict=True)]:
        handle.wait()


def report(title: str, seconds: dict[str, list[float]], used: dict[str, list[float]]) -> None:
    figures = [
        f"{side} {statistics.median(times):.1f} ms ({statistics.median(used[side]):.1f} ms of CPU)"
        for side, times in seconds.items()
    ]
    ours, theirs = (statistics.median(times) for times in seconds.values())
    print(
        f"{title}: {', '.join(figures)}; memory takes {ours / theirs:.3f} of {list(seconds)[1]}", flush=True
    )


if __name__ == "__main__":
    if "HVD_LB_BENCH" in os.environ:
        main()
    else:
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ).parse_args()
        for engine, launcher in JOBS.items():
            mpi = launcher[0] == "mpirun"
            if mpi and not (shutil.which("mpirun") and built_with().get("mpi")):
                print(f"{engine}: not measured, as there is none here", flush=True)
                continue
            environment = {
                **os.environ,
                "HVD_LB_BENCH": engine,
                "OMP_NUM_THREADS": "1",
                "HOROVOD_CYCLE_TIME": "10",
            }
            environment |= {"HOROVOD_CPU_OPERATIONS": "MPI"} if mpi else {}
            subprocess.run([*launcher, sys.executable, __file__], env=environment, check=True)
