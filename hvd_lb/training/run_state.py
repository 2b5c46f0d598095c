"""What changes while a run goes on, in one object, which becomes a checkpoint and comes back from one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lb.exact.digest import STATISTICS
from hvd_lb.optim import DistributedOptimizer
from hvd_lb.optim.average import WeightAverage
from hvd_lb.optim.state_dict import flatten_state, restore_state
from hvd_lb.training.bad_images import BadImages
from hvd_lb.training.batchnorm import ReproducibleStatistics, RunningStatistics
from hvd_lb.training.checkpoint import Snapshot, copied
from hvd_lb.training.evaluation import Evaluation
from hvd_lb.training.models import load_weights
from hvd_lb.training.saved_state import AVERAGED, LOSSES, SavedState, counted_error
from hvd_lb.world import Handle, World


class RunState:
    """The position in the run (`step`, steps done), what has been learnt, and what has not been told yet.

    `workers` are the virtual workers of this process out of `gpus`. With `whole` every process has all of it after each
    step: losses are exchanged in each, and statistics kept so. Then `hand_over` is of one process alone.
    """

    def __init__(
        self,
        world: World,
        workers: range,
        gpus: int,
        *,
        model: nn.Module,
        optimizer: DistributedOptimizer,
        scaler: torch.amp.GradScaler,
        statistics: RunningStatistics,
        bad_images: BadImages,
        device: torch.device,
        whole: bool = False,
        average: WeightAverage | None = None,
    ):
        self._world, self._workers, self.whole = world, workers, whole
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.statistics, self.bad_images = statistics, bad_images
        self.average = average
        if average:
            statistics.keep_average()
        self.step = 0
        # A sum for each virtual worker, 0 for those of other processes: what is added up does not depend on p.
        self.losses = torch.zeros(gpus, dtype=torch.float64, device=device)
        self.loss_images = 0
        # Of the last step, where it is to be told and has not been: the mean over its images, before clipping.
        self.gradient_norm: Tensor | None = None
        self.best_error = math.inf
        self.last_evaluation: Evaluation | None = None
        self.evaluated_at: int | None = None  # steps done at that one
        self.evaluation_due = False
        # Steps whose minibatch is left out (--on-nan rollback).
        self.left_out: set[int] = set()
        # Of a whole state: the losses of the present step, on their way.
        self._exchanged: Handle | None = None
        # As they were before what is under way was begun: exponents change before all sums are there.
        self._exponents: tuple[dict[int, int], list[int]] | None = None

    def begin(self) -> None:
        """Notes, of a `whole` state, what has to be as it was when a failure ends what is begun here."""
        if self.whole:
            self._exponents = self.exponents()

    @property
    def under_way(self) -> bool:
        """Whether something was begun and is not done; known only of a `whole` state."""
        return self._exponents is not None

    def done(self) -> None:
        """What was begun is whole."""
        self._exponents = None

    def exchange_losses(self, losses: Mapping[int, Tensor]) -> None:
        """Starts adding up the losses of a step by virtual worker, of which a `whole` state has those of all."""
        if self.whole:
            sums = torch.zeros_like(self.losses)
            for worker, loss in losses.items():
                sums[worker] = loss
            self._exchanged = self._world.allreduce_async(sums, "hvd_lb.losses.step")

    def step_taken(self, losses: Mapping[int, Tensor], images: int) -> None:
        """A step of `images` images (of all processes) is done; `losses` are those of this process's workers."""
        if self._exchanged:
            self.losses += self._exchanged.wait()
            self._exchanged = None
        else:
            for worker, loss in losses.items():
                self.losses[worker] += loss
        self.loss_images += images
        self.step += 1
        if self.average and images:
            share = self.average.share(self.step)
            self.average.update(share)
            self.statistics.average(share)
        self.done()

    def wait_for_losses(self) -> None:
        """Until the losses that are exchanged, if any, are there."""
        if self._exchanged:
            self._exchanged.wait()

    def give_up_step(self) -> None:
        """Forget what was gathered for a step that is not finished."""
        self.statistics.discard()
        self.optimizer.zero_grad()
        self.bad_images.discard()

    def exponents(self) -> tuple[dict[int, int], list[int]]:
        """Of the next sums in fixed point: those of gradients and of statistics. They follow from the step before."""
        statistics = self.statistics
        return (
            self.optimizer.exponents,
            list(statistics.exponents) if isinstance(statistics, ReproducibleStatistics) else [],
        )

    def take_back(self, exponents: tuple[dict[int, int], list[int]]) -> None:
        """`give_up_step` where all sums of the step were formed; it is taken again with the exponents it had."""
        self.give_up_step()
        self.optimizer.exponents = exponents[0]
        if isinstance(self.statistics, ReproducibleStatistics):
            self.statistics.exponents = exponents[1]

    def finite(self, losses: Tensor) -> bool:
        """Whether weights, velocities and the `losses` of all workers are numbers; the same on all processes."""
        optimizer, _ = flatten_state(self.optimizer.state_dict())
        tensors = [losses, *self.model.state_dict().values(), *optimizer.values()]
        floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        # Both are NaN when any element is; in a ninth of the time that `isfinite` takes on a CPU.
        ends = [end.double().to(losses.device) for tensor in floating for end in torch.aminmax(tensor)]
        return bool(torch.stack(ends).isfinite().all())

    def take_loss(self) -> float:
        """Mean training loss of the images since it was last taken; collective."""
        return self.take_loss_and_sum(torch.zeros(0))[0]

    def take_loss_and_sum(self, beside: Tensor) -> tuple[float, Tensor]:
        """`take_loss`, and by the same exchange the sum of `beside` over the processes."""
        together = torch.cat([self._own_losses(), beside.flatten().to(self.losses)])
        sums = self._world.allreduce(together, "hvd_lb.losses")
        loss = sums[: len(self.losses)].sum().item() / self.loss_images
        self.losses.zero_()
        self.loss_images = 0
        return loss, sums[len(self.losses) :].view_as(beside).to(beside)

    def take_gradient_norm(self) -> float | None:
        """That of the last step, once; None where nobody has noted it."""
        norm, self.gradient_norm = self.gradient_norm, None
        return None if norm is None else norm.item()

    def note_best(self) -> bool:
        """Whether the last evaluation has fewer errors than all that were asked about before."""
        if self.last_evaluation is None:
            return False
        error = counted_error(self.last_evaluation.figures())
        if error is None or error >= self.best_error:
            return False
        self.best_error = error
        return True

    def evaluated(self) -> dict[str, Any]:
        """What an evaluation changes in the checkpoint of its step, as in `saved`."""
        return {
            "best_error": self.best_error if math.isfinite(self.best_error) else None,
            "evaluation": self.last_evaluation.figures() if self.last_evaluation else None,
            "evaluated_at": self.evaluated_at,
            "evaluation_due": self.evaluation_due,
        }

    def gather(self) -> Tensor:
        """Collective, before `saved`: the statistics into the model of every process; the losses of all, by worker."""
        self.statistics.publish(self.step)
        return self.all_losses()

    def saved(
        self,
        losses: Tensor,
        position: dict[str, Any],
        recipe: dict[str, Any],
        data: str,
        environment: dict[str, Any],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], SavedState]:
        """The model's tensors, the optimizer's, and the rest: not copied; on one process, with what `gather` gave.

        `position` has the fields of it that tell where the run is in its plan.
        """
        optimizer, skeleton = flatten_state(self.optimizer.state_dict())
        statistics = self.statistics
        state = SavedState(
            **position,
            recipe=recipe,
            data=data,
            environment=environment,
            optimizer=skeleton,
            scaler=self.scaler.state_dict(),
            loss_images=self.loss_images,
            gradient_norm=None if self.gradient_norm is None else self.gradient_norm.item(),
            **self.evaluated(),
            bad_images=self.bad_images.in_epoch,
            left_out=sorted(self.left_out),
            batch_norm_exponents=(
                list(statistics.exponents) if isinstance(statistics, ReproducibleStatistics) else None
            ),
        )
        return self.model.state_dict(), {**optimizer, **self._averaged(), LOSSES: losses}, state

    def _averaged(self) -> dict[str, Tensor]:
        """The network of averaged weights, as far as it was published, among the optimizer's tensors; not copied."""
        if not self.average:
            return {}
        whole = {**self.model.state_dict(), **self.average.tensors(), **self.statistics.averaged()}
        return {f"{AVERAGED}{name}": tensor for name, tensor in whole.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Meanwhile the model has the averaged weights, and statistics as they were published."""
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        load_weights(self.model, _without(AVERAGED, self._averaged()))
        try:
            yield
        finally:
            load_weights(self.model, own)

    def learnt(self, *, statistics: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the model's tensors, perhaps without batch norm's statistics, and of the optimizer's, on the CPU.

        They are those of a checkpoint but for its losses.
        """

        def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {of: tensors[of] for of in tensors if statistics or not of.endswith(STATISTICS)}

        optimizer = {**flatten_state(self.optimizer.state_dict())[0], **kept(self._averaged())}
        return copied(kept(self.model.state_dict())), copied(optimizer)

    def hand_over(
        self, position: dict[str, Any], recipe: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], SavedState]:
        """As `saved`, by a process alone that has the `whole` state: that at the end of the last step taken."""
        if self._exponents:  # a step was not finished
            self.optimizer.exponents = self._exponents[0]
            if isinstance(self.statistics, ReproducibleStatistics):
                self.statistics.exponents = self._exponents[1]
        self.optimizer.abandon()
        self.statistics.discard()
        self.statistics.keep()
        return self.saved(self.losses, position, recipe, data="", environment={})

    def load(self, snapshot: Snapshot) -> None:
        """Become what was saved; every process loads the same."""
        state, tensors = snapshot.saved, snapshot.optimizer
        load_weights(self.model, snapshot.model)
        self.statistics.adopt()
        if self.average:
            averaged = _without(AVERAGED, tensors)
            self.average.load(averaged)
            self.statistics.adopt_average(averaged)
        self.optimizer.load_state_dict(restore_state(tensors, state.optimizer))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        if isinstance(self.statistics, ReproducibleStatistics) and state.batch_norm_exponents is not None:
            self.statistics.exponents = list(state.batch_norm_exponents)
        self.step = snapshot.step
        self.losses.zero_()
        own = slice(None) if self.whole else slice(self._workers.start, self._workers.stop)
        loss_sum = state.loss_sum
        if loss_sum is None and len(tensors[LOSSES]) != len(self.losses):  # of another k
            loss_sum = tensors[LOSSES].sum().item()
        if loss_sum is None:
            self.losses[own] = tensors[LOSSES][own].to(self.losses.device)
        elif self.whole or own.start == 0:
            self.losses[0] = loss_sum
        self.loss_images = state.loss_images
        norm = state.gradient_norm
        self.gradient_norm = None if norm is None else torch.tensor(norm, dtype=torch.float64)
        self.bad_images.in_epoch = state.bad_images
        self.evaluation_due, self.left_out = state.evaluation_due, set(state.left_out)
        self.best_error = math.inf if state.best_error is None else state.best_error
        self.last_evaluation = Evaluation(**state.evaluation) if state.evaluation else None
        self.evaluated_at = state.evaluated_at

    def all_losses(self) -> Tensor:
        """Loss of every virtual worker since the last record; collective. Adding zeros is exact."""
        return self._world.allreduce(self._own_losses(), "hvd_lb.losses")

    def _own_losses(self) -> Tensor:
        """What this process adds to the losses of all: adding zeros is exact."""
        return torch.zeros_like(self.losses) if self.whole and self._world.rank else self.losses.clone()


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): of for name, of in tensors.items() if name.startswith(prefix)}
