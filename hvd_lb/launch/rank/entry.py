"""Where every process of a run begins, however it was started: `python -m hvd_lb.launch.rank.entry JOB.json`.

Before torch or Horovod are loaded it sets the environment (from the job's file, as command lines can be read by
others), finds out which rank it is, takes its share of the cores, and sends its output to a file of its own. It ends
the process when the launcher that started it is gone. A signal that asks it to end while torch is loaded, which takes
seconds, counts when it trains.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hvd_lb.launch.agent.channel import open_line
from hvd_lb.launch.hosts import Host, place_of_rank
from hvd_lb.launch.rank.names import MEMBER, log_name, this_rank
from hvd_lb.launch.stopping import stop_requests
from hvd_lb.machine import nccl
from hvd_lb.machine.cpu import KERNEL_VARIABLES, usable_cores
from hvd_lb.machine.gpus import gpus
from hvd_lb.machine.pinning import pin
from hvd_lb.report.run_directory import RunDirectory


def main(job_file: str) -> None:
    text = Path(job_file).read_text("utf-8")
    job: dict[str, Any] = json.loads(text)
    stop_requests(RunDirectory(Path(job["output"])).stop)
    for name in KERNEL_VARIABLES:  # what this host has set for itself would be another run's bits
        os.environ.pop(name, None)
    os.environ.update(job["environment"])
    if member := os.environ.get(MEMBER):
        number, host, *there = member.split()
        rank, local_rank, local_size = map(int, (number, *there))
    else:
        if job["starter"] == "slurm" and "HOROVOD_RANK" not in os.environ:
            from hvd_lb.launch.rank.slurm import rank_environment

            os.environ.update(rank_environment(os.environ))
        rank = this_rank()
        hosts = [Host(name, slots) for name, slots in job["hosts"]]
        host, local_rank, local_size = place_of_rank(hosts, rank)
    if interface := job["interfaces"].get(host):
        os.environ["HOROVOD_GLOO_IFACE"] = os.environ["GLOO_SOCKET_IFNAME"] = (
            interface  # Horovod's and torch's
        )
        if nccl.socket_interfaces(os.environ) is None:
            os.environ[nccl.NAME] = f"={interface}"  # this one, and not those whose names begin like it
    cores, pinned = max(1, usable_cores() // local_size), ""
    if job["pin"]:
        buses = [gpu["bus"] for gpu in gpus(os.environ)] if job["device"] == "cuda" else []
        pinned = pin(local_rank, local_size, buses)
    open_line()
    write_to(Path(job["output"]) / "logs" / log_name(rank, host))
    if pinned:
        print(pinned, flush=True)

    from hvd_lb.launch.rank import train  # torch is loaded here, after all of the above

    train.main(text, rank, host, min(cores, usable_cores()))


def write_to(log: Path) -> None:
    """Send what this process writes, that of its libraries too, to `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1])
