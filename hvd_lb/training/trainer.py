"""THE training loop: k virtual workers on p processes, for `train` (p > 1) and `simulate` (p = 1) alike.

Position in a run is the number of steps done, and everything random is a function of it: a run that stops and goes on,
here or on other hardware, is the same run.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from hvd_lb import arithmetic
from hvd_lb.audit.audit import Audit, Disagreement
from hvd_lb.data.decoding.stand_in import StandIn, sizes
from hvd_lb.data.images import Dataset, refuse_other_images
from hvd_lb.data.loading.contract import Batch, Loader
from hvd_lb.data.loading.open import InTurn, Loaders
from hvd_lb.errors import UserError
from hvd_lb.exact.digest import integer_digest
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.exact.reproducible import rounding_environment
from hvd_lb.machine.gpus import gpu_in_words
from hvd_lb.machine.process import peak_memory
from hvd_lb.optim.average import WeightAverage
from hvd_lb.optim.distributed import DistributedOptimizer
from hvd_lb.optim.exchange.buckets import Riders
from hvd_lb.optim.exchange.replicas import Parted
from hvd_lb.optim.make import make_optimizer
from hvd_lb.optim.noise_scale import NoiseScale
from hvd_lb.plan.augment import Microbatch, Origin
from hvd_lb.plan.hosting import hosted
from hvd_lb.plan.run_plan import RunPlan, Scale
from hvd_lb.recipe import Recipe, differing_fields, period_in_seconds, period_in_steps
from hvd_lb.schedule import RescaledSchedule
from hvd_lb.training.bad_images import BadImages
from hvd_lb.training.batchnorm import running_statistics
from hvd_lb.training.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    CheckpointStore,
    Snapshot,
    copied,
    open_checkpoint,
)
from hvd_lb.training.clock import StepClock, Timer
from hvd_lb.training.evaluation import Evaluation, Evaluator, Stopped, open_loaders
from hvd_lb.training.forward import Forward, make_network
from hvd_lb.training.recomputation import Recomputation
from hvd_lb.training.run_state import RunState
from hvd_lb.training.saved_state import Rescaled
from hvd_lb.training.together.group import Group
from hvd_lb.world import World
from hvd_lb.world.arriving import Arriving
from hvd_lb.world.stages import Stage, Staged, Stages

# A step whose gradients or statistics overflow is taken again; the second time their scales are right.
_MOST_REPEATS = 3

# No gradient that is a number needs its loss scaled down so far (fp16).
_SMALLEST_SCALE = 2.0**-16


class Observer(Protocol):
    """What hears of a run; on rank 0 the run directory, elsewhere nobody."""

    def train(self, record: dict[str, Any]) -> None:
        """Metrics of the steps since the last record."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation's errors in per cent."""

    def ranks(self, record: dict[str, Any]) -> None:
        """Seconds that each rank spent since the last record of training, by what it did, and the most memory that it
        has held, as lists; not with one.
        """

    def checkpoint(self, record: dict[str, Any]) -> None:
        """A checkpoint was taken, and for how many seconds that kept the training waiting."""

    def together(self, record: dict[str, Any]) -> None:
        """How many of rank 0's virtual workers are computed together from here on, and why."""

    def repeat(self, record: dict[str, Any]) -> None:
        """A step is taken again, and why."""

    def audit(self, record: dict[str, Any]) -> None:
        """Processes, `liars`, have computed a microbatch wrongly; the step is taken again."""

    def rescale(self, record: dict[str, Any]) -> None:
        """From this step on, which is to come, the run has another number of virtual workers (`scale_records`)."""

    def noise(self, record: dict[str, Any]) -> None:
        """The gradient noise scale over the last steps, in images, and its interval."""

    def digest(
        self, record: dict[str, Any], model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
    ) -> None:
        """What the run has learnt so far, copied, is to be digested and recorded."""

    def rollback(self, record: dict[str, Any]) -> None:
        """The run goes on from step `to`: what was told of steps from there on is told again."""

    def warning(self, record: dict[str, Any]) -> None:
        """Something a user should know that does not end the run."""

    def bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        """Images of a step, or of a pass after it, that could not be decoded, and what was used instead."""

    def microbatch(self, step: int, done: int, of: int) -> None:
        """`done` of this process's `of` microbatches of step `step` have gone through."""

    def evaluating(self, step: int, done: int, of: int, what: str = "evaluation") -> None:
        """After step `step`, `done` of this process's `of` batches of `what` have gone through."""

    def flush(self) -> None:
        """Returns when all that was told is where it shall be; called in another thread, before a checkpoint is there.

        A run that goes on from the checkpoint does not tell it again.
        """

    def catch_up(self) -> None:
        """The same before the sums of a step are there, in an elastic job, but for a limited time.

        So all that this process may leave untold, if it is lost, was told after the last step that others have done.
        """


class Samples(Protocol):
    """What hears which images a step is made of."""

    def given(self, step: int, images: Mapping[int, Sequence[int]]) -> None:
        """By this process to a step, by virtual worker; before the sums of the step can be whole."""

    def taken(self, step: int) -> None:
        """That step was taken."""


class Diverged(RuntimeError):
    """Loss or weights are no longer numbers; going on would waste the machines."""


def _never() -> int:
    return 0


class Membership(Protocol):
    """This process as a member of an elastic job."""

    def wishes(self) -> tuple[bool, bool]:
        """Whether others want to join, so that all shall end this generation; and whether this process has to leave."""

    def step_taken(self, step: int) -> None:
        """So many steps are done."""

    def found_wrong(self, ranks: Sequence[int]) -> None:
        """These processes have computed wrongly, as all have found: they leave, as this generation ends now."""


@dataclass(frozen=True)
class _Said:
    """What the processes said to each other in a step; `sums` are None where the step was left out."""

    sums: Arriving[int] | None
    stand_ins: list[StandIn]
    first: bool  #: of an epoch


class Trainer:
    """A run on this process: built at step 0 or at a checkpoint, `fit` takes it to its end.

    Collective: every process builds one, with the same arguments but for its world's rank. `stop_requested` is asked in
    every step on every process; when it gives a signal's number on any, the run ends after that step with a checkpoint.
    `threads` are those of the loader. `stages` tell what this process does.

    With a `membership` every process has the whole state after each step (`hand_over`), and `fit` also returns, with
    `regrouping`, where processes want to join or to leave. `carried` is what one has handed over; `unfinished`: what
    follows its last step (records, a checkpoint, an evaluation) is to be done. `scales` are those of a run whose k
    has changed; the last one is that of all steps to come. `per_process`: k follows the number of processes, and each
    has so many virtual workers. `terms`: exact sums are formed as those of so many virtual workers. `name` tells people
    which process this is.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        world: World,
        *,
        device: torch.device,
        threads: int,
        observer: Observer,
        store: CheckpointStore | None = None,
        checkpoint: Checkpoint | None = None,
        stop_requested: Callable[[], int] = _never,
        stages: Stages | None = None,
        membership: Membership | None = None,
        carried: Snapshot | None = None,
        unfinished: bool = False,
        samples: Samples | None = None,
        scales: Sequence[Scale] = (),
        per_process: int | None = None,
        terms: int | None = None,
        name: str = "",
    ):
        self.samples = samples
        self.membership, self.unfinished, self.regrouping, self.repeats = membership, unfinished, False, False
        self.stages = stages or Stages()
        world = Staged(world, self.stages)
        self.recipe, self.dataset, self.world, self.device = recipe, dataset, world, device
        self.threads, self.observer, self.store = threads, observer, store
        self.stop_requested = stop_requested
        self.stopped_by = 0  #: a signal's number; set before `fit`, that takes no step and a checkpoint
        # On GPUs, what is said in a step is heard in the next one: sooner, and the host would wait for the exchange. In
        # an elastic job it does so anyway, and who hands over the state shall have heard all.
        self.said: deque[_Said] = deque()
        self.lag = int(world.size > 1 and device.type != "cpu" and membership is None)
        self.writer: BackgroundWriter | None = None
        # Steps below are watched one by one: among them is one after which loss or weights are no numbers.
        self.watched_until = 0
        self.searching, self.vanished = False, 0  # for such a step; how often none was found
        #: Called in each step when its gradients are known, before the update: for whoever looks at them.
        self.on_gradients: Callable[[], None] = lambda: None
        self.told: dict[str, dict[str, Any]] = {}  # the last record of each kind, as rank 0 has told it
        if not scales and checkpoint:
            scales = checkpoint.saved.scales
        self.run_plan = recipe.run_plan(len(dataset.train), dataset.train.labels, scales)
        self.per_process = per_process
        #: Of whole epochs from here on, and the number of virtual workers.
        self.plan, self.gpus = self.run_plan.plan, self.run_plan.plan.workers
        self.schedule = recipe.run_schedule(self.run_plan)
        self.end = min(self.run_plan.end, recipe.steps or self.run_plan.end)
        self.workers = hosted(world.rank, world.size, self.gpus, recipe.fixed_group)
        self.sizes = recipe.image_sizes(self.plan.steps_per_epoch, self.run_plan.offset)
        self.windows_of = cache(recipe.random_windows)
        self.recomputation = Recomputation(recipe, dataset.train, recipe.random_windows())
        begins = carried or checkpoint
        self.model = make_network(recipe, dataset.train.classes, device, goes_on=begins is not None)
        optimizer = DistributedOptimizer(
            make_optimizer(recipe, self.model, self.schedule(0), begins and begins.saved.optimizer),
            self.model,
            world=world,
            schedule=self.schedule,
            reproducible_terms=(terms or self.gpus) if recipe.reproducible else None,
            riders=Riders(signal.NSIG + (3 if membership else 1), self._to_say),
            compress=recipe.compress,
            images=recipe.global_batch,
            skip_on_device=True,
        )
        # A microbatch's loss is a sum: dividing by n gives the scale the gradients of a mean would get.
        scaler = torch.amp.GradScaler(
            device.type,
            init_scale=2.0 ** (16 - math.ceil(math.log2(recipe.per_gpu_batch))),
            enabled=recipe.precision == "fp16",
        )
        # The scaler makes its scale at first use, which a process without images might not come to.
        scaler.scale(torch.zeros(1, device=device))
        terms = max(self.gpus, self.recomputation.count) if recipe.reproducible else None
        # One process knows enough: the first virtual worker is its own, and the sum is everybody's.
        measured = recipe.noise_scale == "on" and self.gpus > 1 and world.rank == 0
        self.noise_scale = NoiseScale() if measured else None
        group = Group(device)
        self.state = RunState(
            world,
            self.workers,
            self.gpus,
            model=self.model,
            optimizer=optimizer,
            scaler=scaler,
            statistics=running_statistics(self.model, world, terms, group, whole=membership is not None),
            bad_images=BadImages.of(recipe, world, observer.bad_images),
            device=device,
            whole=membership is not None,
            average=self._average(),
        )
        self.forward = Forward(
            recipe,
            dataset.train,
            world,
            self.workers,
            model=self.model,
            group=group,
            statistics=self.state.statistics,
            device=device,
            warn=lambda message: self._warn(message, self.step),
        )
        self.audit = Audit(
            recipe.audit,
            recipe.seed,
            self.gpus,
            recipe.fixed_group,
            world,
            lambda step: self.run_plan.at(step).images,
            self._compute_again,
            name,
            partial(gpu_in_words, device.index or 0, os.environ) if device.type == "cuda" else str,
        )
        self._loaders: dict[int, Loaders] = {}  # by the size of images
        self.evaluator = Evaluator.of(recipe, dataset.val, device, threads, self.state.bad_images)
        # Whether the store has what this run begins with.
        self.kept = bool(store and checkpoint and checkpoint.path.parent.resolve() == store.folder.resolve())
        if carried:
            self.state.load(carried)
            self.kept = True
        elif checkpoint:
            self._load(checkpoint)
            if store and not self.kept:
                self.state.best_error = math.inf  # the best of another run is not here
        self.save_due = Timer(period_in_seconds(recipe.checkpoint_every) if world.rank == 0 else math.inf)

    def _average(self) -> WeightAverage | None:
        """That of the weights, with `ema`: over as many images, and from the end of warmup, whatever k was before."""
        recipe, part = self.recipe, self.run_plan.parts[-1]
        if not recipe.ema:
            return None
        since = part.scale.step - part.virtual_step(part.scale.step)
        begins = self.schedule.warmup_steps + round(since)
        return WeightAverage(self.model, recipe.ema, self.plan.global_batch, begins)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def fit(self) -> Evaluation | None:
        """Train up to the end, logging, evaluating and saving on the way; the last evaluation.

        `Diverged` where loss or weights are no numbers, unless `on_nan` leaves the minibatch out.
        """
        self.model.train()
        if self.store and self.world.rank == 0:
            self.writer = BackgroundWriter(self.store, self._warn, before=self.observer.flush)
        try:
            if not self.kept and (self.recipe.on_nan == "rollback" or self.state.evaluation_due):
                self._save()  # to go back to, and to note the evaluation in
            if self.unfinished:
                with self.kernels():
                    self._finish_step(None, save_now=bool(self.stopped_by))
            elif self.stopped_by:
                self._save()
            elif self.state.evaluation_due:
                with self.kernels():
                    self._evaluate(saved=True)
            self._go_on()
        except BaseException:
            if self.writer:
                with suppress(UserError):  # what has gone wrong first is told
                    self.writer.close()
            raise
        if self.writer:
            with self.stages.within(Stage.CHECKPOINT):
                self.writer.close()
        return self.state.last_evaluation

    def _go_on(self) -> None:
        """Steps until the end or a stop, some of them again."""
        repeated: list[int] = []
        if self._goes_on:
            self._tell_scale()
        while self._goes_on:
            try:
                self._take_steps()
            except FixedPointOverflow as overflow:
                repeated.append(self.step)
                if repeated.count(self.step) > _MOST_REPEATS:
                    raise
                self.observer.repeat({**self._position(self.step), "reason": str(overflow)})
            except Disagreement:
                repeated.append(self.step)
                if repeated.count(self.step) > _MOST_REPEATS:
                    raise
                tried = self.audit.settle()
                taken_out = self.membership is not None
                self.observer.audit({**self._position(self.step), **asdict(tried), "taken_out": taken_out})
                if self.membership:
                    self.membership.found_wrong(tried.liars)
                    self.regrouping = True
            except Parted as parted:
                raise RuntimeError(
                    f"weights are no longer the same on all processes, as those of {parted.parameter} tell, though all "
                    "have taken the same steps: one of them computes wrongly, or its memory keeps what it should not. "
                    "Go on from a checkpoint; with --reproducible, --audit finds which"
                ) from parted
            except Diverged as diverged:
                if self.recipe.on_nan == "stop" or self.store is None:
                    raise
                self._roll_back(diverged)

    def _tell_scale(self) -> None:
        """Where k changes with the next step."""
        for record in scale_records(self.run_plan, self.recipe):
            if record["step"] == self.step:
                self.observer.rescale(record)

    @property
    def _goes_on(self) -> bool:
        return self.step < self.end and not self.stopped_by and not self.regrouping

    def _take_steps(self) -> None:
        """Steps from the present one until the end, a stop, an overflow or a loss that is no number."""
        with self.kernels(), self.batches() as loader:
            clock = StepClock(loader)
            while self._goes_on:
                save_now = self.train_step(loader)
                self._finish_step(clock, save_now)

    @cached_property
    def _log_every(self) -> int:
        """Steps of an epoch between records."""
        return self.recipe.log_every or max(1, min(10, self.plan.steps_per_epoch // 20))

    def due(self, every: str) -> bool:
        """Whether something of this period happens after the present number of steps; always at the end."""
        period = period_in_steps(every, self.plan.steps_per_epoch)
        # Epochs end where they do, whatever k was before.
        step = self.step - (self.run_plan.offset if "epoch" in every else 0)
        return self.step == self.end or (period > 0 and step % period == 0)

    def _logged(self, done: int) -> bool:
        """Whether there is a record of training after so many steps."""
        within = (done - self.run_plan.offset) % self.plan.steps_per_epoch
        return within % self._log_every == 0 or done == self.end

    def _finish_step(self, clock: StepClock | None, save_now: bool = False) -> None:
        """What is due after a step; without a clock its time is not known."""
        recipe = self.recipe
        evaluate, save = self.due(recipe.eval_every), self.due(recipe.checkpoint_every)
        digest = recipe.digest_every != "never" and self.due(recipe.digest_every)
        evaluate |= clock is None and self.state.evaluation_due
        if evaluate or save:
            save_now |= self._hear()
        if self.step <= self.watched_until:
            self._check(self.state.gather())
        if self._logged(self.step):
            self._log(clock)
        with clock.paused() if clock else nullcontext(), self.stages.between_steps():
            self.after_step(evaluate, save or save_now, digest)
        self.unfinished = False

    def after_step(self, evaluate: bool, save: bool, digest: bool = False) -> None:
        """What is due after a step: first the checkpoint, then the evaluation, which a kill or a stop may hit."""
        self.state.evaluation_due = evaluate
        if evaluate and self.recomputation.images:
            self.state.begin()
            self._recompute_statistics()
        if digest:
            self._digest()
        if save:
            self._save()
        if evaluate and not self.stopped_by:
            self._evaluate(saved=save)
        self.state.done()

    def train_step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """One weight update from the step's kn images, of which this process takes its workers' share.

        True when some process wants a checkpoint now. FixedPointOverflow, with nothing changed, when the step has to
        be taken again with new `batches`.
        """
        planned = self.run_plan.at(self.step)
        if self.step in self.state.left_out:
            self.state.step_taken({}, 0)
            self.unfinished = True
            self.said.append(_Said(None, [], planned.begins == 0))
            return self._hear(self.lag)
        workers = self._workers_with_images(self.step)
        losses: dict[int, torch.Tensor] = {}
        self.state.begin()
        self.state.bad_images.discard()
        self.stages.step = self.step
        own: tuple[torch.Tensor | None, int] = None, 0
        for group in self.forward.group_size.groups(workers):
            watched = not losses and self.noise_scale is not None and self.noise_scale.due(self.step)
            if watched:
                self.state.optimizer.watch_norm()
            self.stages.enter(Stage.DATA)
            parts = [next(batches) for _ in group]
            self.stages.enter(Stage.COMPUTE)
            last = group[-1] == workers[-1]
            if last:
                self.forward.before_exchange(whole=len(workers) == len(self.workers))
            with self.forward.group_size.timed(sum(len(labels) for _, labels in parts)):
                each = self.forward.losses(self.step, group, parts)
                audited = self.audit.owns(self.step, group)
                if audited:
                    self.state.optimizer.watch_digest()
                    beside = self._digests_beside(each)
                self.state.statistics.after_forward()
                loss = each[0] if len(each) == 1 else torch.stack(each).sum()
                self.state.optimizer.backward(self.state.scaler.scale(loss), last=last)
            if audited:
                self.audit.note(self.step, torch.cat([self.state.optimizer.own_digest(), beside]))
            if watched:
                own = self.state.optimizer.own_norm(), sum(len(labels) for _, labels in parts)
            losses |= zip(group, (loss.detach() for loss in each), strict=True)
            self.observer.microbatch(self.step, len(losses), len(workers))
        if drawn := self.audit.audits(self.step):
            self.audit.note(self.step, self._digests(drawn.workers, batches))
        global_images = planned.images
        if self.samples:
            given = {worker: planned.image_ids(worker).tolist() for worker in losses}
            self.samples.given(self.step, given)
        if self.membership:
            self.observer.catch_up()
        self.state.exchange_losses(losses)
        self._synchronize(global_images)
        self.forward.exchanged()
        self._note_norms(*own, global_images)
        self.on_gradients()
        if self.recipe.clip_norm:  # of the mean gradient, which every process has: the same factor on all
            self.state.scaler.unscale_(self.state.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.state.optimizer.steps = self.step
        self.state.scaler.step(self.state.optimizer)
        self.state.scaler.update()
        self.state.optimizer.zero_grad()
        self.state.statistics.step(min(self.gpus, global_images))
        self.state.step_taken(losses, global_images)
        if self.samples:
            self.samples.taken(self.step - 1)
        self.unfinished = True
        self.stages.taken += 1
        if self.membership:
            self.membership.step_taken(self.step)
        self._tell_group_size()
        self.said.append(
            _Said(self.state.optimizer.carried, self.state.bad_images.take(), first=planned.begins == 0)
        )
        return self._hear(self.lag)

    def _note_norms(self, own: torch.Tensor | None, own_images: int, images: int) -> None:
        """Those that somebody will ask for, before the gradient is clipped; they stay on their device until then."""
        logged = self._logged(self.step + 1)
        if own is None and not logged:
            return
        total, scaler = self.state.optimizer.sum_norm(), self.state.scaler
        scale = scaler.scale(torch.ones((), device=self.device)) ** 2 if scaler.is_enabled() else 1.0
        if self.noise_scale and own is not None:
            self.noise_scale.add(own / scale, own_images, total / scale, images)
        if logged:
            self.state.gradient_norm = (total / scale).sqrt() / images

    def _tell_group_size(self) -> None:
        if self.forward.untold:
            self._warn(self.forward.untold)
            self.forward.untold = ""
        found = self.forward.settled()
        if found and self.world.rank == 0:
            self.observer.together({**self._position(), **found})

    def _to_say(self) -> list[int]:
        """What this process has to tell the others in each step: its signal, a wish to save, and its stand-ins."""
        stop = self.stop_requested()
        signals = [int(number == stop) for number in range(1, signal.NSIG)]
        wishes = map(int, self.membership.wishes()) if self.membership else ()
        return [*signals, int(self.save_due()), len(self.state.bad_images.found), *wishes]

    def _hear(self, but: int = 0) -> bool:
        """Acts on what was said up to now, `but` in the last steps; whether anybody wants a checkpoint now."""
        save = False
        while len(self.said) > but:
            said = self.said.popleft()
            heard = said.sums.wait() if said.sums else [0, 0, 0, 0]
            if self.membership:
                *heard, join, leave = heard
                self.regrouping |= bool(join or leave)
                if leave == self.world.size:  # nobody would go on
                    self.stopped_by = self.stopped_by or signal.SIGTERM
            *signals, saves, stand_ins = heard
            stop = max((number for number, count in enumerate(signals, start=1) if count), default=0)
            self.stopped_by = self.stopped_by or stop
            if self.stopped_by or saves:
                save, but = True, 0  # a checkpoint tells of every step
            self.state.bad_images.settle_step(
                said.stand_ins, stand_ins, first=said.first, images=len(self.dataset.train)
            )
        return save

    def _synchronize(self, global_images: int) -> None:
        """Completes all sums of the step, also when one of them overflows: other processes take part in each."""
        overflow: FixedPointOverflow | None = None
        exponents = self.state.exponents() if self.audit.of(self.step) else ({}, [])
        for complete in (
            self.state.wait_for_losses,
            self.state.statistics.start,
            partial(self.state.optimizer.synchronize, global_images=global_images),
            self.state.statistics.synchronize,
        ):
            try:
                complete()
            except FixedPointOverflow as error:
                overflow = overflow or error
        if overflow:
            self.state.give_up_step()
            raise overflow
        try:
            self.audit.compare(self.step)
        except Disagreement:
            self.state.take_back(exponents)
            raise

    def _compute_again(self, step: int, workers: Sequence[int]) -> torch.Tensor:
        """For an audit, outside of the steps: digests of these workers' microbatches."""
        with (
            self.kernels(),
            self.loaders_at(step).open(self.microbatch(step, of) for of in workers) as loader,
        ):
            return self._digests(workers, loader)

    def _digests(self, workers: Sequence[int], batches: Iterator[Batch]) -> torch.Tensor:
        """Those of gradient, statistics and losses of workers, of this process or others; nothing is added by it."""
        told = len(self.state.bad_images.found)
        parts = [next(batches) for _ in workers]
        del self.state.bad_images.found[told:]  # their own process tells them
        each = self.forward.losses(self.step, workers, parts)
        beside = self._digests_beside(each)
        loss = each[0] if len(each) == 1 else torch.stack(each).sum()
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(self.state.scaler.scale(loss), learning, allow_unused=True)
        self.state.statistics.forget_forward()
        gradients = self.state.optimizer.digest(dict(zip(learning, found, strict=True)))
        return torch.cat([gradients, beside])

    def _digests_beside(self, losses: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of the statistics of the forward that was made last, and of its losses."""
        return torch.cat([self.state.statistics.digest(), integer_digest(losses).cpu()])

    def microbatches(self, steps: range | None = None) -> Iterator[Microbatch]:
        """What this process's virtual workers see in these steps, by default from the present one to the end."""
        for step in range(self.step, self.end) if steps is None else steps:
            if step in self.state.left_out:
                continue
            drawn = self.audit.audits(step)
            for worker in [*self._workers_with_images(step), *(drawn.workers if drawn else ())]:
                yield self.microbatch(step, worker)

    def microbatch(self, step: int, worker: int) -> Microbatch:
        """What a virtual worker, of this process or of another, sees in a step of the run; perhaps nothing."""
        planned = self.run_plan.at(step)
        ids, keys = planned.draws(worker)
        draw = partial(self.windows_of(self.sizes(step)).windows, planned.epoch)
        return Microbatch(
            ids,
            draw(keys, *sizes(self.dataset.train, ids)),
            Origin("train", planned.epoch, step, worker),
            draw,
        )

    def _workers_with_images(self, step: int) -> list[int]:
        """Those that this process computes."""
        return self.audit.own_workers(step, self.run_plan.at(step).with_images(self.workers))

    def batches(self) -> Loader:
        """This process's microbatches as tensors, from the present step to the end."""
        more = self.forward.group_size.most - 1
        stretches = self.sizes.stretches(self.step, self.end)
        return InTurn(
            partial(self.loaders_at(steps.start).open, self.microbatches(steps), more) for steps in stretches
        )

    def loaders_at(self, step: int) -> Loaders:
        """Loaders of images of the size that they have in this step."""
        return self._loaders_of(self.sizes(step))

    def _loaders_of(self, size: int) -> Loaders:
        if size not in self._loaders:
            if len(self._loaders) > 1:  # those of a size that is past
                del self._loaders[min(self._loaders)]
            self._loaders[size] = open_loaders(
                self.recipe, self.dataset.train, size, self.device, self.threads, self.state.bad_images
            )
        return self._loaders[size]

    def kernels(self) -> AbstractContextManager[None]:
        """What steps run in."""
        return arithmetic.kernels(self.recipe)

    def _position(self, step: int | None = None) -> dict[str, int]:
        """Of a step, by default the one just taken: its epoch, and its number in the run."""
        number = self.step - 1 if step is None else step
        return {"epoch": self.run_plan.at(number).epoch, "step": number}

    def _log(self, clock: StepClock | None) -> None:
        images = self.state.loss_images
        # Of each rank: seconds by stage, and memory, which travel with the losses.
        told = torch.zeros(self.world.size, 4, dtype=torch.float64)
        memory = peak_memory(str(self.device)) / 1e9
        told[self.world.rank] = torch.tensor([*self.stages.take(), memory], dtype=torch.float64)
        loss, told = self.state.take_loss_and_sum(told) if images else (None, told)
        norm = self.state.take_gradient_norm()
        seconds, waited = clock.lap() if clock else (math.nan, math.nan)
        if loss is None:  # its steps were left out
            return
        self.told["train"] = record = {
            **self._position(),
            "lr": self.schedule(self.step - 1),
            "loss": loss,
            "images_per_second": images / seconds,
            "data_wait": waited / seconds,
            "gradient_norm": norm,
            "peak_memory_gb": told[:, 3].max().item(),
        }
        if self.world.rank == 0:
            self.observer.train(record)
            if self.noise_scale and (noise := self.noise_scale.estimate()):
                figures = {"noise_scale": noise.value, "low": noise.low, "high": noise.high}
                self.observer.noise({**self._position(), **figures})
            if self.world.size > 1:
                names = "data", "compute", "network", "peak_memory_gb"
                self.observer.ranks({**self._position(), **dict(zip(names, told.t().tolist(), strict=True))})
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        if self.state.scaler.is_enabled() and self.state.scaler.get_scale() < _SMALLEST_SCALE:
            raise UserError(
                f"--precision fp16: the gradients overflow in every step up to step {self.step - 1}, however far the "
                "loss is scaled down, so none of these steps was taken: give --precision bf16 or fp32"
            )

    def _check(self, losses: torch.Tensor) -> None:
        """Diverged, on all processes, when a number is none; `losses` are those of all workers."""
        if not self.state.finite(losses):
            raise self._diverged("the loss or a weight is no finite number")

    def _diverged(self, what: str) -> Diverged:
        position = self._position()
        return Diverged(
            f"{what} after step {position['step']} (epoch {position['epoch']}, learning rate "
            f"{self.schedule(position['step']):g}): lower --learning-rate, lengthen --warmup-epochs, check the data, "
            "or leave such minibatches out with --on-nan rollback"
        )

    def _roll_back(self, diverged: Diverged) -> None:
        """To the newest checkpoint, from where each step is watched; a culprit found so is left out of the run."""
        culprit = self.step - 1
        found, left_out = self.step <= self.watched_until, set(self.state.left_out)
        if found and culprit in left_out:  # then it is not the minibatch
            raise diverged
        if not found and self.searching:  # what was searched for last did not come again
            self.vanished += 1
        if (found or self.vanished) and len(left_out) + self.vanished >= self.recipe.max_rollbacks:
            went = f", {self.vanished} times it did not come again" if self.vanished else ""
            raise Diverged(
                f"{diverged} ({len(left_out)} minibatches were left out before{went}: --max-rollbacks)"
            ) from diverged
        self.searching, self.unfinished = not found, False
        if found:
            left_out.add(culprit)
        else:
            self.watched_until = self.step
        self.said.clear()
        if self.writer:
            self.writer.flush()
        newest = self._newest_checkpoint() if self.world.rank == 0 else b""
        path = self.world.broadcast_bytes(newest, "hvd_lb.rollback").decode(errors="surrogateescape")
        if not path:
            raise diverged
        self.state.give_up_step()
        self._load(open_checkpoint(Path(path)))
        self.state.left_out |= left_out
        record: dict[str, Any] = {**self._position(culprit), "to": self.step, "left_out": found}
        if found:
            record["images"] = self._step_images(culprit)
        self.observer.rollback(record)

    def _newest_checkpoint(self) -> bytes:
        """Its path, or nothing; newer ones that are damaged are set aside."""
        if self.store is None:
            return b""
        checkpoint, damaged = self.store.newest_intact()
        for path, why in damaged.items():
            with suppress(OSError):
                self.store.set_aside(path)
            self._warn(f"{why}; it is set aside, and an older one is gone back to")
        return str(checkpoint.path).encode(errors="surrogateescape") if checkpoint else b""

    def _step_images(self, step: int) -> list[int]:
        """All image ids of a step."""
        planned = self.run_plan.at(step)
        ids = [planned.image_ids(worker) for worker in range(planned.plan.workers)]
        return [int(image) for of_worker in ids for image in of_worker]

    def _warn(self, message: str, step: int | None = None) -> None:
        self.observer.warning({**self._position(step), "message": message})

    @torch.no_grad()
    def _recompute_statistics(self) -> None:
        """Makes batch norm's statistics the mean over the images of `recompute_bn` with the weights as they are."""
        anew, full = self.recomputation, self.recipe.per_gpu_batch
        mine = hosted(self.world.rank, self.world.size, anew.count)
        epoch = self._position()["epoch"]
        loaders = self._loaders_of(self.recipe.image_size)
        with loaders.open(anew.microbatches(epoch, self.step, mine)) as loader:
            for number, (images, _) in zip(mine, loader, strict=True):
                self.stages.enter(Stage.EVALUATION)
                self.observer.evaluating(
                    self.step - 1, number - mine.start, len(mine), "batch norm's statistics"
                )
                self.forward.logits([images], [anew.seed(self.step, number)])
                self.state.statistics.after_forward(len(images) / full)
        try:
            self.state.statistics.synchronize()
        except FixedPointOverflow:
            self.state.statistics.discard()
            self.state.bad_images.discard()
            self._recompute_statistics()
        else:
            self.state.statistics.replace(anew.images / full)
            self.state.bad_images.settle()

    def _evaluate(self, saved: bool) -> None:
        """Evaluate, and note it in the step's checkpoint if it is `saved`, else save one when it is the best.

        A stop gives it up: then the checkpoint says that it is still due.
        """
        self.state.statistics.publish(self.step)
        self.model.eval()
        origin = Origin("eval", **self._position(), number=0)
        evaluate = partial(self.evaluator, self.forward.network, self.world)
        try:
            evaluation = evaluate(self.forward.autocast(), origin, partial(self._evaluating, 0))
            if self.state.average:
                with self.state.averaged(), self.state.bad_images.untold():
                    averaged = evaluate(self.forward.autocast(), origin, partial(self._evaluating, 1))
                evaluation = evaluation.with_averaged(averaged)
        except Stopped as stopped:
            self.stopped_by = stopped.number
            if not saved:
                self._save()
            return
        finally:
            self.model.train()
        self.state.last_evaluation, self.state.evaluated_at = evaluation, self.step
        self.state.evaluation_due = False
        self.told["eval"] = {**self._position(), **evaluation.figures()}
        if self.world.rank == 0:
            self.observer.evaluation(self.told["eval"])
        if self.writer and not saved:
            self.writer.flush()  # whether the best one could be written
        self._forget_lost_best()
        best = self.state.note_best()
        if not saved:
            if best and self.recipe.checkpoint_every != "never":
                self._save(best=True)
        elif self.writer:
            self.writer.conclude(self.step, self.state.evaluated(), best=best)

    def _evaluating(self, passed: int, done: int, of: int) -> int:
        """Before a batch, `passed` passes over all images after the first: the signal by which the run shall end."""
        self.stages.enter(Stage.EVALUATION)
        passes = 2 if self.state.average else 1
        self.observer.evaluating(self.step - 1, passed * of + done, passes * of)
        return self.stop_requested()

    def _digest(self) -> None:
        """Has rank 0 record digests of what the run has learnt; collective in the reproducible mode."""
        whole = self.recipe.reproducible
        if whole:  # else to form the statistics' sums would round them
            self.state.statistics.publish()
        self.told["digest"] = self._position()
        if self.world.rank == 0:
            so_far = sorted(step for step in self.state.left_out if step < self.step)
            left_out = {"left_out": so_far} if so_far else {}
            model, optimizer = self.state.learnt(statistics=whole)
            self.observer.digest({**self._position(), **left_out}, model, optimizer)

    def _forget_lost_best(self) -> None:
        """Where the best could not be written, the best is what `best` leads to; collective, as only rank 0 knows."""
        if self.writer and (kept := self.writer.best_after_loss()) is not None:
            self.state.best_error = kept
        error = torch.tensor([self.state.best_error], dtype=torch.float64)
        self.state.best_error = self.world.broadcast(error, "hvd_lb.best").item()

    def _save(self, *, best: bool = False) -> None:
        """Take a checkpoint. Diverged when there is something in it that is no number."""
        if self.store is None:
            return
        self.stages.enter(Stage.CHECKPOINT)
        began = time.perf_counter()
        losses = self.state.gather()
        self._check(losses)
        self.save_due.restart()
        if self.writer is None:
            return
        model, optimizer, state = self.state.saved(
            losses, self.place, self.recipe.mathematics(), **self._provenance
        )
        # On a slow disk others may be left out.
        needed = best or self.state.evaluation_due or self.step == self.end or bool(self.stopped_by)
        written = self.writer.save(self.step, model, optimizer, state.to_json(), best=best, wait=needed)
        if written and self.step:
            self.observer.checkpoint({**self._position(), "stall_seconds": time.perf_counter() - began})

    @property
    def place(self) -> dict[str, Any]:
        """What a checkpoint tells of the place in the plan."""
        planned, plan = self.run_plan.at(self.step), self.run_plan
        place = {"next": {"epoch": planned.epoch, "step": planned.step}}
        if self.per_process is None and len(plan.scales) == 1:
            return place
        per_process = self.per_process or 0
        found = Rescaled(per_process, plan.scales, plan.end, planned.epoch, planned.begins)
        return {**place, "rescaled": found.to_json()}

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        """What a checkpoint tells of data and machine; found out once, as it takes a while for much data."""
        return {
            "data": self.dataset.fingerprint(),
            "environment": rounding_environment(self.device.type),
        }

    def hand_over(self) -> Snapshot:
        """The state after the last step taken, by this process alone; afterwards this trainer is good for nothing.

        `unfinished` says whether what follows that step is still to be done, `repeats` whether the next was begun.
        """
        self.unfinished |= self.state.evaluation_due
        self.repeats = self.state.under_way and not self.unfinished
        model, optimizer, state = self.state.hand_over(self.place, self.recipe.mathematics())
        return Snapshot(self.step, copied(model), copied(optimizer), state.to_json())

    def _load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this recipe on these data."""
        saved = checkpoint.saved
        if differing := differing_fields(saved.recipe, self.recipe.mathematics()):
            raise UserError(f"checkpoint {checkpoint.path} is of another recipe: {'; '.join(differing)}")
        refuse_other_images(checkpoint.path, saved.data, self._provenance["data"], self.dataset.name)
        self.state.load(checkpoint.read())


def scale_records(plan: RunPlan, recipe: Recipe) -> list[dict[str, Any]]:
    """What is told of each change of k, at its first step: position, k, and what follows from it.

    `lr` is the rate of that step, `full_lr` the one that it rises to.
    """
    schedule, workers, found = recipe.run_schedule(plan), recipe.gpus, []
    for part in plan.parts:
        if part.plan.workers != workers:
            step, end = part.scale.step, part.offset + plan.epochs * part.plan.steps_per_epoch
            rate = schedule(step)
            found.append(
                {
                    **asdict(part.scale),
                    "before": workers,
                    "global_batch": part.plan.global_batch,
                    "lr": rate,
                    "full_lr": schedule.full(step) if isinstance(schedule, RescaledSchedule) else rate,
                    "steps_per_epoch": part.plan.steps_per_epoch,
                    "offset": part.offset,
                    "total_steps": min(end, recipe.steps or end),
                }
            )
        workers = part.plan.workers
    return found
