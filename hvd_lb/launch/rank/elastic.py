"""A rank of an elastic job: it trains in one generation after another, with whoever is there.

A generation ends by a failure, of which the rank has an error of its engine or hears from its agent, or as its members
have agreed after a step, since some want to join or to leave. The process stays. It takes what it has of the run's
state with it, the head says who it is in the next generation (`agent.generations`), and all take the state of rank 0,
who is furthest. So a step is given up by all and taken again, or was taken.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from hvd_lb.data.images import Dataset
from hvd_lb.data.loading.shared_pixels import shared
from hvd_lb.errors import UserError
from hvd_lb.launch.agent.channel import say
from hvd_lb.launch.agent.generations import NO_STATE
from hvd_lb.launch.job import Job
from hvd_lb.launch.rank.member import Carried, Member
from hvd_lb.launch.rank.names import MEMBER, OF_OTHERS, PIXELS
from hvd_lb.launch.rank.training import (
    data_of,
    device_of,
    name_of,
    note_stop,
    observer_of,
    samples_of,
    trainer_of,
)
from hvd_lb.launch.stopping import StopRequests
from hvd_lb.plan.run_plan import RunPlan, Scale
from hvd_lb.report.metrics import RunObserver, SilentObserver, last_records
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.training.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from hvd_lb.training.trainer import Trainer, scale_records
from hvd_lb.world import World
from hvd_lb.world.stages import Stage, Stages


def take_part(job: Job, number: int, cores: int, stop_requested: StopRequests, stages: Stages) -> None:
    """Be member `number` until the end of the run, or until this process is asked to leave."""
    member = Member(number, RunDirectory(job.output).job)  # who is asked to leave from here on
    if stop_requested.taken_back(signal.SIGTERM):  # or was it while torch was loaded
        member.leave()
    newcomer = MEMBER in os.environ
    # Who comes later has the state of others: the checkpoint that the job began with may have made room for new ones.
    checkpoint = open_checkpoint(job.checkpoint) if job.checkpoint and not newcomer else None
    carried = member.inherited() or Carried(NO_STATE if newcomer else _begins_at(checkpoint))
    device = device_of(job, member.local_rank)
    more = {
        **{"device": device, "cores": cores, "checkpoint": checkpoint},
        **{"stop_requested": stop_requested, "stages": stages},
    }
    recipe = job.recipe
    dataset = shared(data_of(job), recipe.cache, recipe.loader, job.device, int(os.environ.get(PIXELS, -1)))
    found = carried if newcomer else _train(job, member, None, carried, dataset, more)
    while found:
        with stages.within(Stage.BETWEEN):
            begun = member.next(found)
        if begun is None:
            return
        if device.type == "cuda":  # the last trainer is garbage, and the next one needs its room
            gc.collect()
            torch.cuda.empty_cache()
        found = _train(job, member, begun, found, dataset, more)


def _train(
    job: Job,
    member: Member,
    begun: dict[str, Any] | None,
    carried: Carried,
    dataset: Dataset,
    more: dict[str, Any],
) -> Carried | None:
    """One generation, with what the head says of it (None: the first one), from what this process has carried to it.

    What it carries to the next; None where there is none for it.
    """
    trainer: Trainer | None = None
    ended = regrouped = False
    stages: Stages = more["stages"]
    stages.taken = 0  # with a new trainer the first step may take long again
    try:
        world = member.join(job.engine, carried, more["device"])
        if begun is None and (world.rank, world.size) != (member.number, job.processes):
            raise UserError(
                f"rank {member.number} of {job.processes} found itself to be rank {world.rank} of {world.size}: the "
                "launcher did not tell it who it is"
            )
        if begun:
            own = _taken_over(job, carried, dataset).to_bytes() if world.rank == 0 else b""
            state = world.broadcast_bytes(own, "hvd_lb.state")
            if not state and job.checkpoint and not more["checkpoint"]:  # nobody has taken a step since
                more["checkpoint"] = open_checkpoint(job.checkpoint)
            carried = Carried.from_bytes(state, _begins_at(more["checkpoint"]))
        present = _Generation(job, member, world, begun, carried, dataset, more["checkpoint"])
        with ExitStack() as stack:
            stack.callback(present.close)
            if world.rank == 0:
                stack.enter_context(more["stop_requested"].watched())
            trainer = present.trainer(**more)
            trainer.stopped_by = present.ends
            trainer.fit()
            regrouped = trainer.regrouping
            ended = bool(trainer.stopped_by) or trainer.step == trainer.end
            stages.enter(Stage.ENDING if ended else Stage.STARTING)
            if ended:
                note_stop(job, trainer, present.gives_up)
        if ended:
            with stages.within(Stage.NETWORK):
                world.barrier()
            say("finished")
            return None
    except Exception as error:
        if type(error).__name__ not in OF_OTHERS:
            raise
        print(f"generation {member.generation} is over: {error}", flush=True)
    stages.enter(Stage.STARTING)
    if trainer:
        snapshot = trainer.hand_over()
        carried = Carried(snapshot.step, snapshot, trainer.unfinished, trainer.repeats, trainer.told)
    member.part(carried, together=regrouped and not ended)
    if regrouped and not ended and present.leaves:
        say("leaving")
        return None
    return carried


def _begins_at(checkpoint: Checkpoint | None) -> int:
    return checkpoint.step if checkpoint else 0


def told_again(step: int, unfinished: bool, untold: bool) -> tuple[int, bool]:
    """From which step on records are told again after `step` steps; and whether also what came after the one before it.

    `unfinished`: what follows the last step (its digest, checkpoint, evaluation) is still to be done. `untold`: its
    losses are, too, and are told with it.
    """
    again = unfinished and untold
    return step - again, unfinished and not again


class _Generation:
    """The present generation on this process; for its trainer it is the job's `Membership`."""

    def __init__(
        self,
        job: Job,
        member: Member,
        world: World,
        begun: dict[str, Any] | None,
        carried: Carried,
        dataset: Dataset,
        checkpoint: Checkpoint | None,
    ):
        self._job, self._member, self._world = job, member, world
        self._carried, self._dataset = carried, dataset
        snapshot = carried.snapshot
        self.ends: int = begun["ends"] if begun else 0  #: the signal by which the run ends before a step
        self.gives_up: str = begun["gives_up"] if begun else ""  #: why it does, where the job cannot go on
        scales = _scales(carried, checkpoint)
        self._plan = plan = _run_plan(job, dataset, scales)
        if job.per_process and not self.ends:
            scales = plan.rescaled(carried.step, job.per_process * world.size)
            self._plan = _run_plan(job, dataset, scales)
            # An epoch of which less than a step is left now has ended by that.
            if self._plan.at(carried.step).epoch > plan.at(carried.step).epoch:
                self._carried = carried = replace(carried, unfinished=True)
        untold = snapshot is not None and bool(snapshot.saved.loss_images)
        told_from, redone = told_again(carried.step, carried.unfinished, untold)
        hosts = begun["hosts"] if begun else job.hosts
        self.observer: RunObserver | SilentObserver = observer_of(
            job, world, hosts, dataset, checkpoint, told_from, self._plan.plan.workers
        )
        self._name = name_of(member.number, world.rank, hosts)
        self.leaves = (
            False  #: with this generation, as the others know; who is asked later goes on until they do
        )
        self._samples = samples_of(job, member.number, member.generation)
        self._since: float | None = None
        self._numbers: list[int] = begun["numbers"] if begun else list(range(world.size))
        if isinstance(self.observer, RunObserver):
            self.observer.numbers = self._numbers
        if begun and isinstance(self.observer, RunObserver):
            change = dict(begun["change"])
            self._since = time.monotonic() - change.pop("seconds")
            step = min(carried.step, _end(job, self._plan) - 1)
            self.observer.generation(
                {
                    **self._position(step),
                    "to": told_from,
                    "redone": redone,
                    "generation": begun["generation"],
                    **change,
                    "repeated": carried.repeats,
                }
            )
            say("begun", generation=begun["generation"])
            self._tell_again(told_from, redone)
            if job.recipe.audit and world.size == 1:
                alone = "one process is left, and nobody to audit it (--audit)"
                self.observer.warning({**self._position(step), "message": alone})

    def _tell_again(self, told_from: int, redone: bool) -> None:
        """The last records, where the process that was rank 0 was lost before it had written them, and changes of k."""
        for change in scale_records(self._plan, self._job.recipe):
            if told_from <= change["step"] < self._carried.step:
                self.observer.rescale(change)
        written = _written(self._job)
        for kind, tell, told_again in (
            ("train", self.observer.train, told_from),
            ("eval", self.observer.evaluation, told_from - redone),
        ):
            record = self._carried.told.get(kind)
            if record and record["step"] < told_again and (kind, record["step"]) not in written:
                tell(record)

    def trainer(
        self, device: torch.device, cores: int, checkpoint: Checkpoint | None, **more: Any
    ) -> Trainer:
        job, carried = self._job, self._carried
        trainer = trainer_of(
            job,
            self._world,
            self._dataset,
            device,
            self.observer,
            cores,
            checkpoint=None if carried.snapshot else checkpoint,
            membership=self,
            carried=carried.snapshot,
            unfinished=carried.unfinished,
            samples=self._samples,
            scales=self._plan.scales,
            per_process=job.per_process,
            name=self._name,
            **more,
        )
        trainer.told |= carried.told
        return trainer

    def close(self) -> None:
        self.observer.close()
        if self._samples:
            self._samples.close()

    def wishes(self) -> tuple[bool, bool]:
        self.leaves = self._member.leaving
        return self._member.asked, self.leaves

    def found_wrong(self, ranks: Sequence[int]) -> None:
        """Who is wrong leaves; the others say so, as it may fail to."""
        self.leaves = self._world.rank in ranks  # what else was told in this step nobody has heard
        if self.leaves:
            self._member.leaving = True
        else:
            say("wrong", members=[self._numbers[rank] for rank in ranks])

    def step_taken(self, step: int) -> None:
        if self._since is not None and isinstance(self.observer, RunObserver):
            self.observer.recovered({**self._position(step - 1), "seconds": time.monotonic() - self._since})
            self._since = None

    def _position(self, step: int) -> dict[str, int]:
        return {"epoch": self._plan.at(step).epoch, "step": step}


def _written(job: Job) -> set[tuple[str | None, int]]:
    """Kinds and steps of the last records."""
    return {(record.get("kind"), record["step"]) for record in last_records(RunDirectory(job.output).metrics)}


def _scales(carried: Carried, checkpoint: Checkpoint | None) -> tuple[Scale, ...]:
    """Those of the state that a process has."""
    if carried.snapshot:
        return carried.snapshot.saved.scales
    return checkpoint.saved.scales if checkpoint else ()


def _run_plan(job: Job, dataset: Dataset, scales: Sequence[Scale]) -> RunPlan:
    return job.recipe.run_plan(len(dataset.train), dataset.train.labels, scales)


def _end(job: Job, plan: RunPlan) -> int:
    return min(plan.end, job.recipe.steps or plan.end)


def _taken_over(job: Job, carried: Carried, dataset: Dataset) -> Carried:
    """The state that this process, as rank 0 of a generation, gives to all: what the one before has not written is
    written again, the digest of the last step with all that follows it.

    The best checkpoint is the one on disk, and the last one of a run is whole before it ends.
    """
    snapshot, recipe = carried.snapshot, job.recipe
    if snapshot is None:
        return carried
    store = CheckpointStore(RunDirectory(job.output).checkpoints, recipe.keep_checkpoints)
    store.discard_after(snapshot.step)
    state = dict(snapshot.state)
    if recipe.checkpoint_every != "never" and (best := store.best_error()) is not None:
        state["best_error"] = best if math.isfinite(best) else None
    unfinished = carried.unfinished
    if snapshot.step == _end(job, _run_plan(job, dataset, snapshot.saved.scales)):
        newest, _ = store.newest_intact()
        unfinished |= newest is None or newest.step < snapshot.step or newest.saved.evaluation_due
    digest = "digest", snapshot.step - 1
    if carried.told.get("digest", {}).get("step") == digest[1]:
        unfinished |= digest not in _written(job)
    return replace(carried, snapshot=replace(snapshot, state=state), unfinished=unfinished)
