"""What a rank does for `hvd-lb doctor --network`: it measures the network with the others instead of training."""

from __future__ import annotations

import torch

from hvd_lb.launch.job import Job
from hvd_lb.launch.rank.names import NETWORK_REPORT
from hvd_lb.network.measure import measure
from hvd_lb.report.run_directory import replace_text
from hvd_lb.world import World


def measure_network(job: Job, world: World, device: torch.device, host: str) -> None:
    """This process's part; rank 0 writes the report beside the logs."""
    report = measure(world, device, host, job.interfaces.get(host, "lo"))
    if world.rank == 0:
        replace_text(job.output / NETWORK_REPORT, report.model_dump_json(indent=1))
    world.barrier()
