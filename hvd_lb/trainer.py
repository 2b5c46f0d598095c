"""THE training loop: k virtual workers on p processes, for `train` (p > 1) and `simulate` (p = 1) alike.

Position in a run is the number of steps done, and everything random is a function of it: a run that stops and goes on,
here or on other hardware, is the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Protocol

import torch

from hvd_lb.batchnorm import RunningStatistics
from hvd_lb.checkpoint import Checkpoint, CheckpointStore
from hvd_lb.data import Dataset
from hvd_lb.data.loader import Loader, Pixels, open_loader
from hvd_lb.errors import UserError
from hvd_lb.evaluate import Evaluation, Evaluator
from hvd_lb.models import build_model, sum_loss
from hvd_lb.optim import SGD, DistributedOptimizer, parameter_groups
from hvd_lb.optim.state import flatten_state, restore_state
from hvd_lb.plan.augment import CentreWindows, Microbatch, RandomWindows
from hvd_lb.plan.counter import generator_seed
from hvd_lb.plan.hosting import hosted
from hvd_lb.plan.samples import SamplePlan
from hvd_lb.recipe import Recipe, differing_fields, period_in_steps
from hvd_lb.world import World

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Observer(Protocol):
    """What hears of a run; on rank 0 the run directory, elsewhere nobody."""

    def train(self, record: dict[str, Any]) -> None:
        """Metrics of the steps since the last record."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation's errors in per cent."""

    def microbatch(self, step: int, done: int, of: int) -> None:
        """`done` of this process's `of` microbatches of step `step` have gone through."""


class Diverged(RuntimeError):
    """The loss is no longer a number; going on would waste the machines."""


class Trainer:
    """A run on this process: built at step 0 or at a checkpoint, `fit` takes it to its end.

    Collective: every process builds one, with the same arguments but for its world's rank.
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
    ):
        self.recipe, self.dataset, self.world, self.device = recipe, dataset, world, device
        self.threads, self.observer, self.store = threads, observer, store
        self.plan = sample_plan(recipe, dataset)
        self.schedule = recipe.lr_schedule(self.plan.steps_per_epoch)
        self.end = total_steps(recipe, self.plan)
        self.workers = hosted(world.rank, world.size, recipe.gpus)
        self.windows = RandomWindows(recipe.seed, recipe.crop_scale, recipe.crop_ratio, recipe.flip)
        self.pixels = Pixels(recipe.image_size, recipe.mean, recipe.std, recipe.antialias)
        self.dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format

        self.model = build_model(
            recipe.model,
            recipe.num_classes or len(dataset.train.classes),
            seed=generator_seed(recipe.seed, 0),
            zero_gamma=recipe.zero_gamma,
            bn_momentum=recipe.bn_momentum,
        ).to(device, self.dtype)
        self.model.to(memory_format=self.memory_format)
        self.forward = torch.compile(self.model) if recipe.compile else self.model
        self.loss = sum_loss(recipe.label_smoothing)
        self.optimizer = DistributedOptimizer(
            SGD(
                parameter_groups(self.model, recipe.weight_decay),
                lr=self.schedule(0),
                momentum=recipe.momentum,
                nesterov=recipe.nesterov,
                form=recipe.momentum_form,
                momentum_correction=recipe.momentum_correction,
            ),
            self.model,
            world=world,
            schedule=self.schedule,
        )
        # A microbatch's loss is a sum: dividing by n gives the scale the gradients of a mean would get.
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=2.0 ** (16 - math.ceil(math.log2(recipe.per_gpu_batch))),
            enabled=recipe.precision == "fp16",
        )
        # The scaler makes its scale at first use, which a process without images might not come to.
        self.scaler.scale(torch.zeros(1, device=device))
        self.step = 0
        self.loss_sum = torch.zeros(1, dtype=torch.float64, device=device)
        self.loss_images = 0
        self.best_error = math.inf
        self.last_evaluation: Evaluation | None = None
        if checkpoint:
            self._load(checkpoint)
        self.statistics = RunningStatistics(self.model, world)

    def fit(self) -> Evaluation | None:
        """Train up to the end, logging, evaluating and saving on the way; the last evaluation."""
        steps_per_epoch = self.plan.steps_per_epoch
        log_every = self.recipe.log_every or max(1, min(10, steps_per_epoch // 20))
        eval_every = period_in_steps(self.recipe.eval_every, steps_per_epoch)
        save_every = period_in_steps(self.recipe.checkpoint_every, steps_per_epoch)
        self.model.train()
        with self.batches() as loader:
            clock = _Clock(loader)
            while self.step < self.end:
                self.train_step(loader)
                done = self.step == self.end
                if self.step % steps_per_epoch % log_every == 0 or done:
                    self._log(clock)
                with clock.paused():
                    evaluated = _due(eval_every, self.step, done)
                    if evaluated:
                        self._evaluate()
                    if _due(save_every, self.step, done):
                        self._save(evaluated)
        return self.last_evaluation

    def train_step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One weight update from the step's kn images, of which this process takes its workers' share."""
        epoch_step = self.step % self.plan.steps_per_epoch
        workers = self._workers_with_images(epoch_step)
        for done, worker in enumerate(workers, start=1):
            images, labels = next(batches)
            # Whatever the model draws (dropout) belongs to the virtual worker, not to the process.
            torch.manual_seed(generator_seed(self.recipe.seed, 1, self.step, worker))
            with self.autocast():
                logits = self.forward(images.to(self.dtype, memory_format=self.memory_format))
                loss = self.loss(logits, labels)
            self.statistics.after_forward()
            self.optimizer.backward(self.scaler.scale(loss), last=done == len(workers))
            self.loss_sum += loss.detach()
            self.observer.microbatch(self.step, done, len(workers))
        global_images = self.plan.step_images(epoch_step)
        self.optimizer.synchronize(global_images=global_images)
        self.optimizer.steps = self.step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.statistics.step(self.plan.active_workers(epoch_step))
        self.loss_images += global_images
        self.step += 1

    def microbatches(self) -> Iterator[Microbatch]:
        """What this process's virtual workers see from the present step to the end."""
        train = self.dataset.train
        for step in range(self.step, self.end):
            epoch, epoch_step = divmod(step, self.plan.steps_per_epoch)
            for worker in self._workers_with_images(epoch_step):
                ids = self.plan.image_ids(epoch, epoch_step, worker)
                yield Microbatch(ids, self.windows.windows(epoch, ids, train.widths[ids], train.heights[ids]))

    def _workers_with_images(self, epoch_step: int) -> list[int]:
        return [worker for worker in self.workers if len(self.plan.positions(epoch_step, worker))]

    def batches(self) -> Loader:
        """This process's microbatches as tensors, from the present step to the end."""
        return open_loader(
            self.recipe.loader,
            self.dataset.train,
            self.microbatches(),
            self.pixels,
            batch_size=self.recipe.per_gpu_batch,
            device=self.device,
            threads=self.threads,
        )

    def autocast(self) -> AbstractContextManager[None]:
        if self.recipe.precision not in _AUTOCAST:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.recipe.precision])

    def _position(self) -> dict[str, int]:
        """Of the step just taken: its epoch, and its number in the run."""
        return {"epoch": (self.step - 1) // self.plan.steps_per_epoch, "step": self.step - 1}

    def _reduce_loss(self) -> None:
        """Gather the loss since the last record on rank 0; it starts again from zero elsewhere."""
        self.world.allreduce(self.loss_sum, "hvd_lb.loss")
        if self.world.rank != 0:
            self.loss_sum.zero_()

    def take_loss(self) -> float:
        """Mean training loss of the images since it was last taken, on rank 0; collective."""
        self._reduce_loss()
        loss = self.loss_sum.item() / self.loss_images
        self.loss_sum.zero_()
        self.loss_images = 0
        return loss

    def _log(self, clock: _Clock) -> None:
        images = self.loss_images
        loss = self.take_loss()
        seconds, waited = clock.lap()
        if self.world.rank == 0:
            record = {
                **self._position(),
                "lr": self.schedule(self.step - 1),
                "loss": loss,
                "images_per_second": images / seconds,
                "data_wait": waited / seconds,
            }
            self.observer.train(record)
            if not math.isfinite(loss):
                raise Diverged(
                    f"the loss is {loss} at step {self.step - 1} (epoch {record['epoch']}, learning rate "
                    f"{record['lr']:g}): lower --learning-rate, lengthen --warmup-epochs, or check the data"
                )

    def _evaluate(self) -> None:
        self.statistics.publish(self.step)
        evaluator = Evaluator(
            images=self.dataset.val,
            windows=CentreWindows(self.recipe.eval_crop),
            pixels=self.pixels,
            batch_size=self.recipe.per_gpu_batch,
            loader=self.recipe.loader,
            threads=self.threads,
            device=self.device,
            dtype=self.dtype,
            memory_format=self.memory_format,
        )
        self.model.eval()
        self.last_evaluation = evaluator(self.forward, self.world, self.autocast())
        self.model.train()
        if self.world.rank == 0:
            self.observer.evaluation({**self._position(), **asdict(self.last_evaluation)})

    def _save(self, evaluated: bool) -> None:
        """Write a checkpoint; it is the best when it was just evaluated and no saved one had fewer errors."""
        if self.store is None:
            return
        self.statistics.publish(self.step)
        self._reduce_loss()
        best = False
        if evaluated and self.last_evaluation and self.last_evaluation.top1_error < self.best_error:
            self.best_error, best = self.last_evaluation.top1_error, True
        if self.world.rank != 0:
            return
        optimizer, skeleton = flatten_state(self.optimizer.state_dict())
        epoch, epoch_step = divmod(self.step, self.plan.steps_per_epoch)
        state = {
            "next": {"epoch": epoch, "step": epoch_step},
            "recipe": self.recipe.mathematics(),
            "data": self.dataset.fingerprint(),
            "optimizer": skeleton,
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum.item(),
            "loss_images": self.loss_images,
            "best_error": self.best_error if math.isfinite(self.best_error) else None,
            "evaluation": asdict(self.last_evaluation) if self.last_evaluation else None,
        }
        self.store.save(self.step, self.model.state_dict(), optimizer, state, best=best)

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if differing := differing_fields(state["recipe"], self.recipe.mathematics()):
            raise UserError(f"checkpoint {checkpoint.path} is of another recipe: {'; '.join(differing)}")
        if state["data"] != self.dataset.fingerprint():
            raise UserError(
                f"checkpoint {checkpoint.path} was trained on other data than {self.dataset.name} is now "
                "(images, labels or sizes differ): give the data set it began with, or another --output"
            )
        self.model.load_state_dict(checkpoint.model())
        self.optimizer.load_state_dict(restore_state(checkpoint.optimizer(), state["optimizer"]))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step = checkpoint.step
        if self.world.rank == 0:
            self.loss_sum.fill_(state["loss_sum"])
        self.loss_images = state["loss_images"]
        self.best_error = math.inf if state["best_error"] is None else state["best_error"]
        self.last_evaluation = Evaluation(**state["evaluation"]) if state["evaluation"] else None


def sample_plan(recipe: Recipe, dataset: Dataset) -> SamplePlan:
    """The plan of a recipe on a data set; UserError when its minibatch is larger than the data."""
    return SamplePlan(
        len(dataset.train),
        recipe.gpus,
        recipe.per_gpu_batch,
        generator_seed(recipe.seed, 2),
        recipe.last_batch,
    )


def total_steps(recipe: Recipe, plan: SamplePlan) -> int:
    """The number of steps of a run: its epochs', or fewer where --steps ends it."""
    total = recipe.epochs * plan.steps_per_epoch
    return min(total, recipe.steps or total)


def _due(period: int, step: int, done: bool) -> bool:
    """Whether something of this period in steps (0: never) happens after `step` steps; always at the end."""
    return done or (period > 0 and step % period == 0)


class _Clock:
    """Time spent in steps, without what lies between them (evaluation, checkpoints)."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._start, self._wait_start = time.perf_counter(), loader.wait_seconds

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them spent waiting for data."""
        now, wait_now = time.perf_counter(), self._loader.wait_seconds
        lap = now - self._start, wait_now - self._wait_start
        self._start, self._wait_start = now, wait_now
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before
