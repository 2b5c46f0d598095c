"""From the images of virtual workers to their losses: how the network of a run computes microbatches.

One by one or several together, by kernels that are launched or by recorded graphs: whatever it is, the losses and what
backward makes of them are the same, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lb import arithmetic
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Batch
from hvd_lb.errors import HostError, UserError
from hvd_lb.exact.reproducible import fast_kernels
from hvd_lb.kernels.batch_norm import proved_batch_norm
from hvd_lb.machine.graphs import GraphRecorder, Recorder, Recording, Recordings, Trial
from hvd_lb.plan.classes import class_weights, drawn_of_classes
from hvd_lb.plan.counter import generator_seed
from hvd_lb.plan.mixing import Mixing, Targets
from hvd_lb.recipe import Recipe
from hvd_lb.training.batchnorm import RunningStatistics, allow_single_values
from hvd_lb.training.models import batch_norms, begin_with, build_model, freeze_backbone, sum_loss
from hvd_lb.training.together.group import Group, draw_apart
from hvd_lb.training.together.size import GroupSize, room_for_groups
from hvd_lb.training.together.strange import strange
from hvd_lb.world import World


def make_network(recipe: Recipe, classes: Sequence[str], device: torch.device, *, goes_on: bool) -> nn.Module:
    """The network as a run of this recipe begins with it; where the run goes on, weights come from elsewhere."""
    model = build_model(
        recipe.model,
        recipe.num_classes or len(classes),
        seed=generator_seed(recipe.seed, 0),
        zero_gamma=recipe.zero_gamma,
        bn_momentum=recipe.bn_momentum,
    ).to(device, arithmetic.dtype(recipe))
    if recipe.init_from and not goes_on:
        begin_with(model, recipe.init_from, classes)
    if recipe.freeze == "backbone":
        freeze_backbone(model)
    model.to(memory_format=arithmetic.memory_format(recipe))
    allow_single_values(model)
    arithmetic.widen_depthwise(model, recipe, device)
    return model


class Forward:
    """The losses of virtual workers, those of this process (`workers`) or others, by `model` as it is.

    `group` and `statistics` are the model's. `warn` is told of what is slower than it could be.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Images,
        world: World,
        workers: range,
        *,
        model: nn.Module,
        group: Group,
        statistics: RunningStatistics,
        device: torch.device,
        warn: Callable[[str], None],
    ):
        self.recipe, self.model, self.group, self.device = recipe, model, group, device
        self._statistics, self._warn = statistics, warn
        self.dtype, self.memory_format = arithmetic.dtype(recipe), arithmetic.memory_format(recipe)
        #: What is called with the images of a microbatch, or several.
        self.network = arithmetic.compiled(model) if recipe.compile else model
        self.class_weights = self._class_weights(train)
        self.loss = sum_loss(recipe.label_smoothing, self.class_weights)
        self.mixing = Mixing(recipe.seed, recipe.mixup, recipe.cutmix)
        self.drawing = draw_apart(model, group)
        recorded = recipe.cuda_graphs != "off" and not recipe.compile and device.type == "cuda"
        self.recorder: Recorder | None = GraphRecorder(device) if recorded else None
        self.recordings = Recordings()
        tried = self.recorder and world.size > 1 and recipe.cuda_graphs == "auto"
        self.trial = Trial(device) if tried else None
        self._launches = False  # the present microbatch's kernels one by one, whatever is recorded
        self.untold = ""  # why groups are slower than they could be
        self._told_group_size = False
        self.group_size = self._choose_group_size(workers, world.local_size)

    def _class_weights(self, train: Images) -> Tensor | None:
        """Of the network's outputs, in the dtype of its weights."""
        recipe = self.recipe
        if recipe.class_weights is None:
            return None
        classes = len(train.classes)
        drawn = drawn_of_classes(train.labels, classes, recipe.sampling)
        weights = class_weights(recipe.class_weights, drawn, recipe.num_classes or classes)
        return torch.from_numpy(weights).to(self.device, self.dtype)

    # How many workers are computed together

    def _choose_group_size(self, workers: range, processes_here: int) -> GroupSize:
        """As `together` says, where this process has several workers that can be computed together.

        By itself a run leaves them apart where the size of a group would change more than rounding, or costs a
        compilation each time.
        """
        recipe = self.recipe
        cautious = recipe.reproducible or recipe.compile or recipe.precision == "fp16"
        cautious |= bool(recipe.progressive_size)  # what has room at first need not have it later
        given: int | None = None if recipe.together == "auto" else recipe.together
        if given is None and cautious:
            given = 1
        why = ""
        if len(workers) > 1 and given != 1:
            self._find_batch_norm()
            why = "dropout cannot be compiled so" if self.drawing and recipe.compile else self._strange()
            if why and given:
                raise UserError(
                    f"--together {given}: virtual workers of {recipe.model} cannot be computed together ({why}): leave "
                    "the option out"
                )
        return GroupSize(
            workers,
            1 if why else given,
            images=recipe.per_gpu_batch,
            device=self.device,
            room=partial(room_for_groups, self.device, processes_here),
            why=why,
        )

    def _find_batch_norm(self) -> None:
        """Kernels for a group's batch norm, on a GPU; compiled graphs have their own."""
        recipe = self.recipe
        if self.device.type != "cuda" or recipe.compile or not batch_norms(self.model):
            return
        last = self.memory_format == torch.channels_last
        self.group.batch_norm, why = proved_batch_norm(self.device, arithmetic.activations(recipe), last)
        if why and recipe.reproducible:  # a choice by machine, and it changes bits
            raise UserError(f"--together {recipe.together}: {why}: mend that, or leave the option out")
        self.untold = why and f"{why}: it is computed for one after the other, which takes longer"

    def _strange(self) -> str:
        """Why workers together are not workers apart; nothing of the run is changed by trying it."""
        recipe, training = self.recipe, self.model.training
        shape = min(2, recipe.per_gpu_batch), 3, recipe.image_size, recipe.image_size
        like = torch.empty(0, 0, 0, 0, dtype=self.dtype, device=self.device).to(
            memory_format=self.memory_format
        )
        self.model.train()
        try:
            with fast_kernels():
                return strange(self.model, self.group, shape, like)
        finally:
            self.model.train(training)
            self._statistics.discard()

    def settled(self) -> dict[str, Any] | None:
        """How many are computed together, once: when it has been found, or there was a reason not to look for one."""
        size = self.group_size
        if self._told_group_size or not (size.speeds or size.why):
            return None
        self._told_group_size = True
        self.recordings.keep(lambda key: key[0] == size.size)
        found = {str(size): speed for size, speed in size.speeds.items()}
        return {"together": size.size, "images_per_second": found, "why": size.why}

    # Whether the last ones of a step are replayed, where backward could meet the exchange

    def before_exchange(self, *, whole: bool) -> None:
        """Before the last group of a step; `whole` where the step has all workers."""
        if self.trial and not self.group_size.searching:
            self._launches = not self.trial.replays
            if whole:  # the same group each time
                self.trial.begin()

    def exchanged(self) -> None:
        """After all sums of a step."""
        if self.trial:
            self._launches = False
            self.trial.end()

    # Forward

    def losses(self, step: int, workers: Sequence[int], parts: Sequence[Batch]) -> list[Tensor]:
        """The loss of each of these workers, computed together, on its images and labels."""
        seeds = [generator_seed(self.recipe.seed, 1, step, worker) for worker in workers]
        mixed = [self.mixing(*part, step, worker) for worker, part in zip(workers, parts, strict=True)]
        images, targets = zip(*mixed, strict=True)
        logits = self.logits(images, seeds).split(list(map(len, targets)))
        with self.autocast():
            return [self.loss_of(*of) for of in zip(targets, logits, strict=True)]

    def loss_of(self, targets: Targets, logits: Tensor) -> Tensor:
        """Of one virtual worker's images, a sum."""
        return targets.loss(self.loss, logits)

    def logits(self, parts: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
        """Of microbatches, one after the other.

        What the model draws for each (dropout) depends on its seed, and neither on the process nor on the others.
        """
        sizes = list(map(len, parts))
        recording = self._recording(parts, sizes, seeds)
        self.group.begin(sizes, seeds)
        if recording:
            torch.cat(list(parts), out=recording.images)
            return recording()
        if len(parts) == 1:
            images = parts[0].to(self.dtype, memory_format=self.memory_format)
        else:
            images = self._images_like(parts)
            torch.cat(list(parts), out=images)
        with self.autocast():
            return self.network(images)

    def autocast(self) -> AbstractContextManager[None]:
        return arithmetic.autocast(self.recipe, self.device)

    def _images_like(self, parts: Sequence[Tensor]) -> Tensor:
        """Room for all of them as the network gets them."""
        shape = sum(map(len, parts)), *parts[0].shape[1:]
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format)

    def _recording(
        self, parts: Sequence[Tensor], sizes: Sequence[int], seeds: Sequence[int]
    ) -> Recording | None:
        """Of a forward and backward of such microbatches, where there is one; what it takes to make it is drawn."""
        choice, full = self.recipe.cuda_graphs, set(sizes) == {self.recipe.per_gpu_batch}
        if not (self.recorder and full and self.model.training and torch.is_grad_enabled()):
            return None
        if self._launches or (self.drawing and len(sizes) > 1):  # a graph draws the numbers of one worker
            return None

        def record() -> Recording:
            assert self.recorder
            self.group.begin(sizes, seeds)
            images = self._images_like(parts).zero_()
            return Recording(self.model, images, self.recorder, self.autocast, self._statistics)

        key = len(sizes), parts[0].shape
        try:
            return self.recordings.of(key, record)
        except torch.OutOfMemoryError as error:
            if choice == "on" and not self.group_size.searching:
                raise HostError(
                    f"--cuda-graphs on: there is no memory to record {len(sizes)} × {sizes[0]} images of "
                    f"{self.recipe.model}: leave the option out"
                ) from error
            self.recordings.leave_out(key)
            self.group_size.drop(len(sizes))
            self._warn(f"no memory for a CUDA graph of {len(sizes)} × {sizes[0]} images: they do without")
        except RuntimeError as error:
            why = " ".join(str(error).split())
            if choice == "on":
                raise UserError(f"--cuda-graphs on: {self.recipe.model} cannot be recorded: {why}") from error
            self._warn(f"without CUDA graphs, as {self.recipe.model} cannot be recorded: {why}")
            self.recorder = None
        self._statistics.forget_forward()
        return None
