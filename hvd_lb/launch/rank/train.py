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

from hvd_lb import world as worlds
from hvd_lb.audit.audit import Undecided
from hvd_lb.data.loading.shared_pixels import shared
from hvd_lb.errors import HostError, UserError
from hvd_lb.launch.agent.channel import tell
from hvd_lb.launch.hang.watch import watched
from hvd_lb.launch.job import Job
from hvd_lb.launch.options import HANG_TIMEOUT
from hvd_lb.launch.rank.elastic import take_part
from hvd_lb.launch.rank.training import (
    data_of,
    device_of,
    name_of,
    note_stop,
    observer_of,
    samples_of,
    trainer_of,
)
from hvd_lb.launch.stopping import StopRequests, stop_requests
from hvd_lb.report.run_directory import RunDirectory, write_json
from hvd_lb.training.checkpoint import open_checkpoint
from hvd_lb.training.trainer import Diverged
from hvd_lb.world import World
from hvd_lb.world.stages import Stage, Stages


def train(job: Job, world: World, stop_requested: StopRequests, cores: int, stages: Stages) -> None:
    """This process's part of the job; it has so many `cores` for itself."""
    device = device_of(job, world.local_rank)
    checkpoint = open_checkpoint(job.checkpoint) if job.checkpoint else None
    recipe, dataset = job.recipe, data_of(job)
    first_step = checkpoint.step if checkpoint else 0
    observer = observer_of(job, world, job.hosts, dataset, checkpoint, first_step)
    try:
        trainer = trainer_of(
            job,
            world,
            shared(dataset, recipe.cache, recipe.loader, device.type, str(job.output), world.barrier),
            device,
            observer,
            cores,
            checkpoint=checkpoint,
            stop_requested=stop_requested,
            stages=stages,
            samples=samples_of(job, world.rank),
            name=name_of(world.rank, world.rank, job.hosts),
        )
        trainer.fit()
        stages.enter(Stage.ENDING)
        note_stop(job, trainer)
    finally:
        observer.close()
    with stages.within(Stage.NETWORK):
        world.barrier()


def main(job_text: str, rank: int, host: str, cores: int, end: Callable[[int], object] = os._exit) -> None:
    """`rank` and `host` are those that the launcher gave this process, `cores` its share of the host's.

    `job_text` is a `Job` in JSON. `end` ends the process with a status at once.
    """
    job = Job.from_json(job_text)
    directory, stages = RunDirectory(job.output), Stages()
    stop_requested = stop_requests(directory.stop, end)
    watch = watched(directory, rank, stages, float(os.environ.get(HANG_TIMEOUT, 0)))
    try:
        tell("arrived")
        if job.elastic:
            with watch:
                take_part(job, rank, cores, stop_requested, stages)
            end(0)
        world = worlds.init(job.engine, watched=True)
        if (world.rank, world.size) != (rank, job.processes):
            raise UserError(
                f"rank {rank} of {job.processes} found itself to be rank {world.rank} of {world.size}: "
                "the launcher did not tell it who it is"
            )
        if job.task != "train":
            from hvd_lb.launch.rank import measuring

            work = measuring.measure_network if job.task == "network" else measuring.compare_bits
            work(job, world, device_of(job, world.local_rank), host)
        else:
            with stop_requested.watched() if rank == 0 else nullcontext(), watch:
                train(job, world, stop_requested, cores, stages)
    except BaseException as error:
        with suppress(OSError):  # the disk is full
            _write_error(directory, rank, host, error)
            traceback.print_exc()
            sys.stderr.flush()
        # At once, without Horovod's shutdown: it would wait for the others, who are waiting for this process.
        repeats = isinstance(error, UserError | Diverged | Undecided) and not isinstance(error, HostError)
        end(2 if job.elastic and repeats else 1)
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
