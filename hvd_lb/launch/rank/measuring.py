"""What a rank does for `hvd-lb doctor` in place of training: it measures with the others."""

from __future__ import annotations

import json

import torch

from hvd_lb.doctor.alike import answer
from hvd_lb.launch.job import Job
from hvd_lb.launch.rank.names import MEASURED
from hvd_lb.network.measure import measure
from hvd_lb.report.run_directory import replace_text
from hvd_lb.world import World
from hvd_lb.world.gather import gather_bytes


def measure_network(job: Job, world: World, device: torch.device, host: str) -> None:
    """This process's part of `--network`; rank 0 writes the report beside the logs."""
    report = measure(world, device, host, job.interfaces.get(host, "lo"))
    if world.rank == 0:
        replace_text(job.output / MEASURED, report.model_dump_json(indent=1))
    world.barrier()


def compare_bits(job: Job, world: World, device: torch.device, host: str) -> None:
    """This process's part of `--selftest`, likewise."""
    mine = answer(device, host, world.rank)
    said = gather_bytes(world, mine.model_dump_json().encode(), "hvd_lb.alike")
    if world.rank == 0:
        replace_text(job.output / MEASURED, json.dumps([json.loads(text) for text in said], indent=1))
    world.barrier()
