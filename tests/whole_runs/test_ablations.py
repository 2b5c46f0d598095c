"""The classic mistakes (paper section 3 and remarks 1 to 4), each made on purpose, leave the reference.

7 steps: warmup, a short step, and a learning rate ten times smaller. The control shows that nothing else differs.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from plain_case import EXACT, Reference, largest_difference, make_trainer, run_plain

from hvd_lb.plan.per_worker import PerWorkerPlan
from hvd_lb.plan.run_plan import RunPlan
from hvd_lb.plan.samples import SamplePlan
from hvd_lb.training.trainer import Trainer

STEPS = 7
FAR = 1e-6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return run_plain(tmp_path_factory.mktemp("plain"), STEPS)


def run(trainer: Trainer) -> list[float]:
    """The loss of every step."""
    losses = []
    trainer.model.train()
    with trainer.batches() as batches:
        for _ in range(STEPS):
            trainer.train_step(batches)
            losses.append(trainer.state.take_loss())
    trainer.state.statistics.publish(STEPS)
    return losses


def differences(plain: Reference, trainer: Trainer) -> tuple[float, float]:
    """Of the weights and of the running statistics."""
    state = trainer.model.state_dict()
    return largest_difference(plain.weights, state), largest_difference(plain.statistics, state)


@pytest.mark.parametrize(
    "changes",
    [{}, {"momentum_form": 9}, {"reproducible": True}],
    ids=["form 10", "form 9", "reproducible"],
)
def test_control(plain: Reference, changes: dict[str, Any]) -> None:
    trainer = make_trainer(**changes)
    assert run(trainer) == pytest.approx(plain.losses, rel=0, abs=EXACT)
    assert max(differences(plain, trainer)) < EXACT


def no_momentum_correction(trainer: Trainer) -> None:
    for group in trainer.state.optimizer.param_groups:
        group["momentum_correction"] = False


def normalised_by_n(trainer: Trainer) -> None:
    normalise(trainer, lambda images: trainer.recipe.per_gpu_batch)


def normalised_by_a_full_step(trainer: Trainer) -> None:
    normalise(trainer, lambda images: trainer.recipe.global_batch)


def normalise(trainer: Trainer, by: Callable[[int], int]) -> None:
    synchronize = trainer.state.optimizer.synchronize

    def otherwise(*, images: int | None = None, global_images: int | None = None) -> None:
        synchronize(images=images, global_images=global_images and by(global_images))

    trainer.state.optimizer.synchronize = otherwise


def normalised_by_each_process(trainer: Trainer) -> None:
    """Every worker divides by its own count, and the sum by the number of workers, as averaging allreduces do."""
    loss_sum, plan = trainer.forward.loss, trainer.plan

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images = plan.step_images(trainer.step % plan.steps_per_epoch)
        return loss_sum(logits, labels) / len(labels) * images / plan.workers

    trainer.forward.loss = loss


def decayed_batch_norm(trainer: Trainer) -> None:
    for group in trainer.state.optimizer.param_groups:
        group["weight_decay"] = trainer.recipe.weight_decay


def decayed_by_each_worker(trainer: Trainer) -> None:
    for group in trainer.state.optimizer.param_groups:
        group["weight_decay"] *= trainer.recipe.gpus


def scaled_loss(trainer: Trainer) -> None:
    """kn / 256 multiplies the loss and not the learning rate: of weight decay too little is left (remark 1)."""
    ratio, loss_sum = trainer.recipe.global_batch / 256, trainer.forward.loss
    trainer.forward.loss = lambda logits, labels: ratio * loss_sum(logits, labels)
    for group in trainer.state.optimizer.param_groups:
        group["lr_scale"] = 1 / ratio


def shuffled_by_each_worker(trainer: Trainer) -> None:
    plan = PerWorkerPlan(**{field.name: getattr(trainer.plan, field.name) for field in fields(SamplePlan)})
    places = [(step, worker) for step in range(plan.steps_per_epoch) for worker in range(plan.workers)]
    epoch = np.concatenate([plan.image_ids(0, step, worker) for step, worker in places])
    assert np.array_equal(np.sort(epoch), np.arange(plan.images))
    trainer.run_plan = RunPlan(plan, trainer.recipe.epochs)


@pytest.mark.parametrize(
    "ablate",
    [
        no_momentum_correction,
        normalised_by_n,
        normalised_by_a_full_step,
        normalised_by_each_process,
        decayed_batch_norm,
        decayed_by_each_worker,
        scaled_loss,
        shuffled_by_each_worker,
    ],
)
def test_ablation_leaves_the_reference(plain: Reference, ablate: Callable[[Trainer], None]) -> None:
    trainer = make_trainer()
    ablate(trainer)
    run(trainer)
    assert differences(plain, trainer)[0] > FAR


def test_running_statistics_updated_by_every_forward_are_others(plain: Reference) -> None:
    trainer = make_trainer()
    statistics = trainer.state.statistics
    add, update = statistics.after_forward, statistics.step

    def after_forward() -> None:
        add()
        update(1)

    statistics.after_forward = after_forward
    statistics.step = lambda active_workers: None
    run(trainer)
    weights, running = differences(plain, trainer)
    assert weights < EXACT
    assert running > FAR
