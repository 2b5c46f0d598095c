"""A step looked at while it is taken again: the loss of each image, the gradient's norm, one worker's own gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_lb.plan.mixing import Targets
from hvd_lb.replay.again import Again
from hvd_lb.training.models import sum_loss
from hvd_lb.training.trainer import Trainer


@dataclass(frozen=True)
class ImageSeen:
    """An image of a step: its place, what it is, what the network took it for, and its loss."""

    worker: int  #: virtual worker
    position: int  #: among the worker's images
    image: int  #: number within the training images
    name: str
    label: str
    predicted: str
    loss: float


@dataclass(frozen=True)
class StepSeen:
    """A step: mean loss over its images, norm of its mean gradient without weight decay; `own` are of `worker` alone.

    `images` are those of `worker`, or all. Gradients are by the names of the parameters; they are kept where they were
    asked for.
    """

    step: int
    epoch: int
    learning_rate: float
    loss: float
    gradient_norm: float
    images: list[ImageSeen]
    gradients: dict[str, Tensor]
    worker: int | None = None
    own_loss: float | None = None
    own_gradient_norm: float | None = None
    own_gradients: dict[str, Tensor] | None = None


class _Noted(NamedTuple):
    """Of one virtual worker: its loss, that of each of its images, and the number of the class each was taken for."""

    sum: float
    losses: list[float]
    predicted: list[int]


class WatchedSteps:
    """Watches the steps of a window (`first` to `last`) and keeps the one with the largest loss: `seen`.

    Nothing that is looked at changes a bit of what is computed.
    """

    def __init__(self, again: Again, first: int, last: int, worker: int | None, gradients: bool):
        self.seen: StepSeen | None = None
        self._again, self._steps, self._worker, self._keep = again, range(first, last + 1), worker, gradients
        self._noted: list[_Noted] = []
        self._own: dict[str, Tensor] = {}
        self._norm, self._gradients = math.nan, dict[str, Tensor]()
        again.on_trainer = self._watch
        self._watch(again.trainer)

    def _watch(self, trainer: Trainer) -> None:
        self._loss_of = trainer.forward.loss_of
        trainer.forward.loss_of = self._watched_loss  # type: ignore[method-assign]
        trainer.on_gradients = self._watch_gradients

    def take(self) -> StepSeen:
        """Takes all steps up to the window's end."""
        self._again.take(self._steps.stop, self._before, self._after)
        if self.seen is None:
            raise RuntimeError(f"no step of {self._steps} was taken")
        return self.seen

    def _before(self, step: int) -> None:
        self._noted.clear()
        if step in self._steps and self._worker is not None:
            self._own = self._own_gradients(step, self._worker)
            self._noted.clear()

    def _watched_loss(self, targets: Targets, logits: Tensor) -> Tensor:
        loss = self._loss_of(targets, logits)
        if self._again.step in self._steps:
            trainer, known = self._again.trainer, logits.detach()
            alone = sum_loss(trainer.recipe.label_smoothing, trainer.forward.class_weights, reduction="none")
            each = targets.loss(alone, known)
            self._noted.append(_Noted(loss.item(), each.tolist(), known.argmax(1).tolist()))
        return loss

    def _watch_gradients(self) -> None:
        if self._again.step not in self._steps:
            return
        trainer = self._again.trainer
        gradients = trainer.state.optimizer.mean_gradients()
        scale = trainer.state.scaler.get_scale()  # 1 where there is none
        self._gradients = {name: gradient / scale for name, gradient in gradients.items()}
        self._norm = _norm(self._gradients)

    def _own_gradients(self, step: int, worker: int) -> dict[str, Tensor]:
        """Of the mean loss over the worker's images, by the weights before the step."""
        trainer = self._again.trainer
        with trainer.loaders_at(step).open([trainer.microbatch(step, worker)]) as loader:
            batch = next(loader)
        loss = trainer.forward.losses(step, [worker], [batch])[0] / len(batch[1])
        learning = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
        trainer.state.statistics.discard()
        pairs = zip(learning, found, strict=True)
        return {name: gradient for name, gradient in pairs if gradient is not None}

    def _after(self, step: int) -> None:
        if step not in self._steps or not self._noted:
            return
        trainer = self._again.trainer
        # Added up as the run does it.
        sums = torch.zeros(trainer.plan.workers, dtype=torch.float64)
        planned = trainer.run_plan.at(step)
        for worker, noted in zip(planned.with_images(), self._noted, strict=True):
            sums[worker] = noted.sum
        loss = sums.sum().item() / planned.images
        if self.seen and not _worse(loss, self.seen.loss):
            return
        images = [image for image in self._images(step) if self._worker in (None, image.worker)]
        own: dict[str, Any] = {}
        if self._worker is not None:
            own = {
                "worker": self._worker,
                "own_loss": sums[self._worker].item() / len(images),
                "own_gradient_norm": _norm(self._own),
                "own_gradients": self._own if self._keep else None,
            }
        self.seen = StepSeen(
            step=step,
            epoch=planned.epoch,
            learning_rate=trainer.schedule(step),
            loss=loss,
            gradient_norm=self._norm,
            images=images,
            gradients=self._gradients if self._keep else {},
            **own,
        )

    def _images(self, step: int) -> Iterator[ImageSeen]:
        trainer = self._again.trainer
        images = trainer.dataset.train
        planned = trainer.run_plan.at(step)
        classes = dict(enumerate(images.classes))
        for worker, noted in zip(planned.with_images(), self._noted, strict=True):
            ids = planned.image_ids(worker).tolist()
            for position, (image, loss, guess) in enumerate(
                zip(ids, noted.losses, noted.predicted, strict=True)
            ):
                yield ImageSeen(
                    worker,
                    position,
                    image,
                    images.name(image),
                    classes[int(images.labels[image])],
                    classes.get(guess, f"output {guess}"),
                    loss,
                )


def _norm(gradients: dict[str, Tensor]) -> float:
    if not gradients:
        return 0.0
    return torch.stack(torch._foreach_norm(list(gradients.values()))).double().norm().item()


def _worse(loss: float, than: float) -> bool:
    """What is no number is worst."""
    return not math.isnan(than) and (math.isnan(loss) or loss > than)
