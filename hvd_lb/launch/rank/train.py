"""One process of a run, on every rank alike: hvd_lb.launch.rank.entry has prepared it.

It writes nothing to the terminal: rank 0 tells the run directory what happens, and a process that fails writes why.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch

from hvd_lb import world as worlds
from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.loading.shared_pixels import shared
from hvd_lb.errors import UserError
from hvd_lb.launch.agent.channel import tell
from hvd_lb.launch.hang.watch import watched
from hvd_lb.launch.hosts import Host, host_of_rank
from hvd_lb.launch.job import Job
from hvd_lb.launch.options import HANG_TIMEOUT
from hvd_lb.launch.stopping import StopRequests
from hvd_lb.machine.placement import loader_threads
from hvd_lb.plan.hosting import hosted
from hvd_lb.replay.beginning import beginning
from hvd_lb.report.metrics import RunObserver, SilentObserver
from hvd_lb.report.ranks import RankTimes
from hvd_lb.report.run_directory import RunDirectory, write_json
from hvd_lb.trained.weights import metadata_of
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.stages import Stage, Stages


def train(job: Job, world: World, stop_requested: StopRequests, cores: int, stages: Stages) -> None:
    """This process's part of the job; it has so many `cores` for itself."""
    device = _ready(job, world)
    directory = RunDirectory(job.output)
    checkpoint = open_checkpoint(job.checkpoint) if job.checkpoint else None
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
    first_step = checkpoint.step if checkpoint else 0
    observer: RunObserver | SilentObserver = SilentObserver()
    if world.rank == 0:
        plan = recipe.sample_plan(len(dataset.train))
        chained = recipe.digest_every != "never"
        begin = beginning(recipe, plan, job.data_fingerprint, checkpoint) if chained else None
        observer = RunObserver(directory, first_step, _rank_times(job), begin)
    try:
        trainer = Trainer(
            recipe,
            shared(dataset, recipe.cache, recipe.loader, device.type, str(job.output), world.barrier),
            world,
            device=device,
            threads=loader_threads(
                recipe.loader_threads, job.threads, cores, reproducible=recipe.reproducible
            ),
            observer=observer,
            store=CheckpointStore(
                directory.checkpoints, recipe.keep_checkpoints, metadata_of(recipe, dataset.train.classes)
            ),
            checkpoint=checkpoint,
            stop_requested=stop_requested,
            stages=stages,
        )
        trainer.fit()
        stages.enter(Stage.ENDING)
        if world.rank == 0 and (trainer.step < trainer.end or trainer.state.evaluation_due):
            write_json(directory.stopped, {"signal": trainer.stopped_by, "steps": trainer.step})
    finally:
        observer.close()
    with stages.within(Stage.NETWORK):
        world.barrier()


def _rank_times(job: Job) -> RankTimes:
    hosts = [Host(name, slots) for name, slots in job.hosts]
    ranks = range(job.processes)
    workers = [len(hosted(rank, job.processes, job.recipe.gpus)) for rank in ranks]
    return RankTimes([host_of_rank(hosts, rank) for rank in ranks], workers)


def _ready(job: Job, world: World) -> torch.device:
    """The device of this process, which is set, and its threads."""
    torch.set_num_threads(job.threads)
    device = _device(job, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _device(job: Job, world: World) -> torch.device:
    """The GPU of this process: that of its local rank, or the only one it sees, where a scheduler shows it no other."""
    if job.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank if torch.cuda.device_count() > 1 else 0)


def main(job_text: str, rank: int, host: str, cores: int, end: Callable[[int], object] = os._exit) -> None:
    """`rank` and `host` are those that the launcher gave this process, `cores` its share of the host's.

    `job_text` is a `Job` in JSON. `end` ends the process with a status at once.
    """
    job = Job.from_json(job_text)
    directory, stages = RunDirectory(job.output), Stages()
    stop_requested = StopRequests(directory.stop, end)
    try:
        tell("arrived")
        world = worlds.init(job.engine)
        if (world.rank, world.size) != (rank, job.processes):
            raise UserError(
                f"rank {rank} of {job.processes} found itself to be rank {world.rank} of {world.size}: "
                "the launcher did not tell it who it is"
            )
        if job.task != "train":
            from hvd_lb.launch.rank import measuring

            work = measuring.measure_network if job.task == "network" else measuring.compare_bits
            work(job, world, _ready(job, world), host)
        else:
            with (
                stop_requested.watched() if rank == 0 else nullcontext(),
                watched(directory, rank, stages, float(os.environ.get(HANG_TIMEOUT, 0))),
            ):
                train(job, world, stop_requested, cores, stages)
    except BaseException as error:
        with suppress(OSError):  # the disk is full
            _write_error(directory, rank, host, error)
            traceback.print_exc()
            sys.stderr.flush()
        # At once, without Horovod's shutdown: it would wait for the others, who are waiting for this process.
        end(1)
    worlds.shutdown()


def _write_error(directory: RunDirectory, rank: int, host: str, error: BaseException) -> None:
    content = {
        "rank": rank,
        "host": host,
        "time": time.time(),
        "kind": type(error).__name__,
        "message": " ".join(str(error).split()) or type(error).__name__,
        "traceback": traceback.format_exc(),
    }
    write_json(directory.error(rank), content)
