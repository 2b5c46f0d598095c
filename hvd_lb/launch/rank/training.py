"""What a rank needs to train: its device, the data, and the trainer with all that it tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import Dataset
from hvd_lb.errors import UserError
from hvd_lb.exact.reproducible import rounding_environment
from hvd_lb.launch.hosts import Host, host_of_rank
from hvd_lb.launch.job import Job
from hvd_lb.machine.placement import loader_threads
from hvd_lb.plan.hosting import hosted
from hvd_lb.recipe import FLOAT_FIELDS
from hvd_lb.replay.beginning import beginning
from hvd_lb.report.metrics import RunObserver, SilentObserver
from hvd_lb.report.ranks import RankTimes
from hvd_lb.report.run_directory import RunDirectory, write_json
from hvd_lb.report.samples import SampleLog
from hvd_lb.trained.weights import metadata_of
from hvd_lb.training.checkpoint import Checkpoint, CheckpointStore
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World


def device_of(job: Job, local_rank: int) -> torch.device:
    """The device of this process, which is set, and its threads.

    The GPU of its place among those of its host, or the only one it sees, where a scheduler shows it no other.
    """
    torch.set_num_threads(job.threads)
    if job.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
    torch.cuda.set_device(device)
    return device


def data_of(job: Job) -> Dataset:
    """The images; UserError where they are not those that the run was planned with."""
    recipe = job.recipe
    dataset = open_dataset(
        recipe.data or "",
        val=recipe.val,
        val_fraction=recipe.val_fraction,
        on_bad_image=recipe.on_bad_image,
        expected=job.data_fingerprint,
    )
    if dataset.fingerprint() != job.data_fingerprint:
        raise UserError(
            f"{recipe.data} on this host is not the data set that the run was planned with (other names, "
            "places, bytes, sizes or labels of images): copy it again"
        )
    return dataset


def observer_of(
    job: Job,
    world: World,
    hosts: Sequence[tuple[str, int]],
    dataset: Dataset,
    checkpoint: Checkpoint | None,
    first_step: int,
    gpus: int | None = None,
) -> RunObserver | SilentObserver:
    """On rank 0 it writes into the run directory what happens from `first_step` on; `hosts` are those of the world.

    The job begins at `checkpoint`. `gpus` is k, where it is not the recipe's any more.
    """
    if world.rank:
        return SilentObserver()
    there = [Host(name, slots) for name, slots in hosts]
    ranks = range(world.size)
    workers = [len(hosted(rank, world.size, gpus or job.recipe.gpus)) for rank in ranks]
    times = RankTimes([host_of_rank(there, rank) for rank in ranks], workers)
    recipe = job.recipe
    plan = recipe.sample_plan(len(dataset.train), dataset.train.labels)
    chained = recipe.digest_every != "never"
    begin = beginning(recipe, plan, job.data_fingerprint, checkpoint) if chained else None
    environment = {
        "processes": world.size,
        "recipe": recipe.model_dump(mode="json", include=FLOAT_FIELDS),
        "rounding": rounding_environment(job.device),
    }
    return RunObserver(RunDirectory(job.output), first_step, times, begin, environment)


def trainer_of(
    job: Job,
    world: World,
    dataset: Dataset,
    device: torch.device,
    observer: RunObserver | SilentObserver,
    cores: int,
    **more: Any,
) -> Trainer:
    """The trainer of a process that has so many `cores`; `more` are further arguments of it."""
    recipe = job.recipe
    return Trainer(
        recipe,
        dataset,
        world,
        device=device,
        threads=loader_threads(recipe.loader_threads, job.threads, cores, reproducible=recipe.reproducible),
        observer=observer,
        store=CheckpointStore(
            RunDirectory(job.output).checkpoints,
            recipe.keep_checkpoints,
            metadata_of(recipe, dataset.train.classes),
        ),
        **more,
    )


def name_of(number: int, rank: int, hosts: Sequence[tuple[str, int]]) -> str:
    """Process `number` of a job, which has this rank on these hosts, for people: `rank 5 on h2`."""
    return f"rank {number} on {host_of_rank([Host(*host) for host in hosts], rank)}"


def samples_of(job: Job, number: int, generation: int = 0) -> SampleLog | None:
    """Where this process writes which images it gives to each step, if that is asked for."""
    return SampleLog(RunDirectory(job.output).logs, number, generation) if job.log_samples else None


def note_stop(job: Job, trainer: Trainer, gives_up: str = "") -> None:
    """Says, if this is rank 0 and the run has not come to its end, by what it was stopped and where.

    `gives_up`: why it cannot go on, where it was not asked to end.
    """
    if trainer.world.rank == 0 and (trainer.step < trainer.end or trainer.state.evaluation_due):
        stopped = {"signal": trainer.stopped_by, "steps": trainer.step, "gives_up": gives_up}
        write_json(RunDirectory(job.output).stopped, stopped)
