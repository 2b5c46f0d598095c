"""The training loop against a plain PyTorch program that shares nothing with it but the images it is shown."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.batchnorm import RunningStatistics
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Diverged, Trainer
from hvd_lb.world.solo import Solo

CPU = torch.device("cpu")


def small_data(images: int = 150, val: int = 37) -> Dataset:
    """Coloured noise of 8 × 8 pixels in 5 classes that differ in brightness."""
    rng = np.random.default_rng(0)

    def split(count: int, title: str) -> ArrayImages:
        labels = rng.integers(0, 5, count)
        pixels = rng.integers(0, 120, (count, 8, 8, 3)) + 25 * labels[:, None, None, None]
        return ArrayImages(pixels.astype(np.uint8), labels, list("abcde"), title)

    return Dataset("small", split(images, "train"), split(val, "val"))


CLIPPED: list[bool] = []  # by `reference`, step by step


def small_recipe(**changes: Any) -> Recipe:
    base = {
        "model": "resnet8", "image_size": 8, "gpus": 4, "per_gpu_batch": 8, "epochs": 3, "precision": "fp64",
        "eval_crop": 1.0, "learning_rate": 0.4, "warmup": "none", "together": 1, "eval_every": "never",
        "checkpoint_every": "never",
    }  # fmt: skip
    return Recipe(**{**base, **changes})


class Records(SilentObserver):
    def __init__(self) -> None:
        self.training: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.repeats: list[dict[str, Any]] = []
        self.rollbacks: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.groups: list[dict[str, Any]] = []

    def train(self, record: dict[str, Any]) -> None:
        self.training.append(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)

    def checkpoint(self, record: dict[str, Any]) -> None:
        self.checkpoints.append(record)

    def repeat(self, record: dict[str, Any]) -> None:
        self.repeats.append(record)

    def together(self, record: dict[str, Any]) -> None:
        self.groups.append(record)

    def rollback(self, record: dict[str, Any]) -> None:
        self.rollbacks.append(record)

    def warning(self, record: dict[str, Any]) -> None:
        self.warnings.append(record["message"])


def make_trainer(recipe: Recipe, data: Dataset | None = None, **arguments: Any) -> Trainer:
    arguments = {"device": CPU, "threads": 1, "observer": Records(), **arguments}
    return Trainer(recipe, data or small_data(), Solo(), **arguments)


def reference(trainer: Trainer, steps: int) -> nn.Module:
    """Plain PyTorch: a loop over virtual workers, torch.optim.SGD, its own learning rate and batch norm formula."""
    recipe, plan = trainer.recipe, trainer.plan
    model = copy.deepcopy(trainer.model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 or name == "fc.bias"]
    others = [p for name, p in model.named_parameters() if not (p.ndim > 1 or name == "fc.bias")]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=1.0, momentum=0.9, nesterov=True,
    )  # fmt: skip
    for norm in norms:
        norm.momentum = 1.0
    running = [(torch.zeros_like(n.running_mean), torch.ones_like(n.running_var)) for n in norms]  # type: ignore[arg-type]
    model.train()
    with trainer.batches() as batches:
        for step in range(steps):
            epoch_step = step % plan.steps_per_epoch
            count = plan.step_images(epoch_step)
            optimizer.zero_grad()
            statistics = []
            for worker in range(recipe.gpus):
                if not len(plan.positions(epoch_step, worker)):
                    continue
                x, y = next(batches)
                (F.cross_entropy(model(x.double()), y, reduction="sum") / count).backward()
                statistics.append([(n.running_mean.clone(), n.running_var.clone()) for n in norms])  # type: ignore[operator, union-attr]
            if recipe.clip_norm:
                length = sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None) ** 0.5
                CLIPPED.append(bool(length > recipe.clip_norm))
                for p in model.parameters():
                    assert p.grad is not None
                    p.grad.mul_(min(1.0, recipe.clip_norm / float(length)))
            third = sum(step >= drop * recipe.epochs * plan.steps_per_epoch / 90 for drop in (30, 60, 80))
            for group in optimizer.param_groups:
                group["lr"] = 0.4 * recipe.gpus * recipe.per_gpu_batch / 256 * 0.1**third
            optimizer.step()
            for i, (mean, var) in enumerate(running):
                running[i] = (
                    0.9 * mean + 0.1 * torch.stack([s[i][0] for s in statistics]).mean(0),
                    0.9 * var + 0.1 * torch.stack([s[i][1] for s in statistics]).mean(0),
                )
    for norm, (mean, var) in zip(norms, running, strict=True):
        norm.running_mean, norm.running_var = mean, var
    return model


def run_steps(trainer: Trainer, steps: int) -> None:
    trainer.model.train()
    with trainer.batches() as batches:
        for _ in range(steps):
            trainer.train_step(batches)
    trainer.state.statistics.publish(trainer.step)


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    return max(
        (x.double() - y.double()).abs().max().item() for (name, x), y in pairs if "num_batches" not in name
    )


@pytest.mark.slow
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("last_batch", ["drop", "keep"])
@pytest.mark.parametrize("momentum_form", [9, 10])
def test_equals_plain_pytorch(last_batch: str, momentum_form: int, reproducible: bool) -> None:
    """Across a drop of the learning rate; `keep` ends each epoch with 22 images for 4 workers."""
    recipe = small_recipe(last_batch=last_batch, momentum_form=momentum_form, reproducible=reproducible)
    trainer = make_trainer(recipe)
    plain = reference(trainer, trainer.end)
    run_steps(trainer, trainer.end)
    assert largest_difference(trainer.model, plain) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"reproducible": True}, {"momentum_form": 9}])
def test_long_gradients_are_clipped(changes: dict[str, Any]) -> None:
    """The mean gradient of a step, by its length over all tensors; shorter ones stay. (Against torch: to its 1e-6.)"""
    trainer = make_trainer(small_recipe(clip_norm=0.85, **changes))
    CLIPPED.clear()
    plain = reference(trainer, trainer.end)
    assert {True, False} == set(CLIPPED)
    run_steps(trainer, trainer.end)
    assert largest_difference(trainer.model, plain) < 1e-5
    assert largest_difference(reference(make_trainer(small_recipe()), trainer.end), plain) > 1e-3


@pytest.mark.slow
def test_clipping_in_fp32_and_fp16_sees_the_mean_gradient() -> None:
    """Not the sums that the fused update divides, nor the multiples of the loss scaler."""
    lengths = {}
    for precision in ("fp64", "fp32", "fp16"):
        trainer = make_trainer(small_recipe(precision=precision, clip_norm=1e-3, momentum=0.0, nesterov=False,
                                            weight_decay=0.0))  # fmt: skip
        before = [p.detach().clone() for p in trainer.model.parameters()]
        run_steps(trainer, 1)
        moved = [
            (p.detach() - old).double().norm()
            for p, old in zip(trainer.model.parameters(), before, strict=True)
        ]
        lengths[precision] = torch.stack(moved).norm().item() / trainer.schedule(0)
    assert lengths == {name: pytest.approx(1e-3, rel=1e-2) for name in lengths}


@pytest.mark.slow
def test_ablations_leave_the_reference() -> None:
    trainer = make_trainer(small_recipe(momentum_correction=False))
    plain = reference(trainer, trainer.end)
    run_steps(trainer, trainer.end)
    assert largest_difference(trainer.model, plain) > 1e-6


@pytest.mark.slow
def test_fewer_images_than_workers_in_the_last_step() -> None:
    trainer = make_trainer(small_recipe(last_batch="keep", gpus=8, per_gpu_batch=4), small_data(images=67))
    assert trainer.plan.active_workers(2) == 3
    plain = reference(trainer, trainer.end)
    run_steps(trainer, trainer.end)
    assert largest_difference(trainer.model, plain) < 1e-12


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_running_statistics_follow_the_formula(workers: int) -> None:
    """r ← (1 − m) r + (m / k) Σ s_j, once per step, for k virtual workers on one process."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=0.1).double()
    model = nn.Sequential(layer)
    statistics = RunningStatistics(model, Solo())
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    model.train()
    for _ in range(3):
        batches = [torch.randn(4, 3, 5, 5).double() * (j + 1) + j for j in range(workers)]
        for batch in batches:
            model(batch)
            statistics.after_forward()
        statistics.step(workers)
        mean = 0.9 * mean + 0.1 / workers * sum(b.mean((0, 2, 3)) for b in batches)
        var = 0.9 * var + 0.1 / workers * sum(b.transpose(0, 1).flatten(1).var(1) for b in batches)
    statistics.publish(steps=3)
    assert torch.allclose(layer.running_mean, mean, rtol=1e-13)  # type: ignore[arg-type]
    assert torch.allclose(layer.running_var, var, rtol=1e-13)  # type: ignore[arg-type]
    assert layer.num_batches_tracked == 3


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"reproducible": True}, {"reproducible": True, "recompute_bn": 20}])
def test_stopped_and_resumed_in_mid_epoch_is_bitwise_the_same(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    recipe = small_recipe(
        precision="fp32", epochs=2, eval_every="1epoch", checkpoint_every="3steps", log_every=5, **changes
    )
    whole = make_trainer(recipe, store=CheckpointStore(tmp_path / "whole", keep=9))
    whole.fit()
    assert whole.plan.steps_per_epoch == 4
    resumed = make_trainer(
        recipe,
        store=CheckpointStore(tmp_path / "resumed"),
        checkpoint=open_checkpoint(tmp_path / "whole" / "step-00000003"),
    )
    assert resumed.step == 3
    resumed.fit()
    assert largest_difference(whole.model, resumed.model) == 0
    pairs = zip(whole.state.optimizer.state.values(), resumed.state.optimizer.state.values(), strict=True)
    assert all(torch.equal(a["velocity"], b["velocity"]) for a, b in pairs)
    later = [r for r in whole.observer.evaluations if r["step"] >= 3]  # type: ignore[attr-defined]
    assert resumed.observer.evaluations == later  # type: ignore[attr-defined]
    losses = [[r["loss"] for r in t.observer.training if r["step"] >= 3] for t in (whole, resumed)]  # type: ignore[attr-defined]
    assert losses[0] == losses[1]
    files = [t.store.folder / "last" for t in (whole, resumed)]  # type: ignore[union-attr]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_the_loss_of_a_record_is_the_mean_since_the_one_before() -> None:
    """Of the last step there is always one."""
    told = []
    for log_every in (1, 2):
        trainer = make_trainer(small_recipe(steps=3, log_every=log_every))
        trainer.fit()
        told.append([(record["step"], record["loss"]) for record in trainer.observer.training])  # type: ignore[attr-defined]
    losses = [loss for _, loss in told[0]]
    assert told[1] == [(1, pytest.approx(sum(losses[:2]) / 2)), (2, pytest.approx(losses[2]))]


def test_a_checkpoint_of_other_data_or_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(steps=1)
    make_trainer(recipe, store=CheckpointStore(tmp_path)).fit()
    checkpoint = open_checkpoint(tmp_path / "last")
    with pytest.raises(UserError, match="other data than small"):
        make_trainer(recipe, small_data(images=151), checkpoint=checkpoint)
    with pytest.raises(UserError, match="seed: 0 → 1"):
        make_trainer(small_recipe(seed=1), checkpoint=checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}])
def test_precisions_and_layouts_stay_near_fp32(changes: dict[str, Any]) -> None:
    trainers = [make_trainer(small_recipe(**{"precision": "fp32", **c})) for c in ({}, changes)]
    for trainer in trainers:
        run_steps(trainer, 3)
    assert 0 < largest_difference(trainers[0].model, trainers[1].model) < 0.05


@pytest.mark.slow
def test_loss_scaling_survives_a_checkpoint(tmp_path: Path) -> None:
    recipe = small_recipe(precision="fp16", steps=2)
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path))
    trainer.state.scaler.update(512.0)
    trainer.fit()
    longer = small_recipe(precision="fp16", steps=4)
    resumed = make_trainer(longer, checkpoint=open_checkpoint(tmp_path / "last"))
    assert resumed.state.scaler.state_dict() == trainer.state.scaler.state_dict()
    assert resumed.state.scaler.get_scale() == 512.0


def test_dropout_belongs_to_the_virtual_worker_and_step() -> None:
    """The global generator's state before the run plays no part."""
    models = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        trainer = make_trainer(small_recipe(precision="fp32"))
        trainer.forward.network = nn.Sequential(trainer.model, nn.Dropout(0.5)).train()
        torch.manual_seed(noise)
        run_steps(trainer, 2)
        models.append(trainer.model)
    assert largest_difference(*models) == 0


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    trainer = make_trainer(small_recipe(learning_rate=1e30, zero_gamma=False))
    with pytest.raises(Diverged, match="lower --learning-rate"):
        trainer.fit()


def test_initial_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (build_model("resnet20", 10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert largest_difference(a, b) == 0
    assert largest_difference(a, c) > 0


@pytest.mark.slow
def test_float_and_reproducible_mode_agree() -> None:
    trainers = [make_trainer(small_recipe(precision="fp32", reproducible=mode)) for mode in (False, True)]
    for trainer in trainers:
        run_steps(trainer, 10)
    assert 0 < largest_difference(trainers[0].model, trainers[1].model) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("of", ["gradients", "statistics", "both"])
def test_a_step_that_overflows_is_taken_again(of: str) -> None:
    """Scales a million times too fine: the step changes nothing, is reported, and fits the second time."""
    recipe = small_recipe(reproducible=True, last_batch="keep", epochs=1)
    trainer, undisturbed = make_trainer(recipe), make_trainer(recipe)
    undisturbed.fit()
    step = trainer.train_step

    def sabotaged(batches: Any) -> bool:
        if trainer.step == 2 and not trainer.observer.repeats:  # type: ignore[attr-defined]
            if of != "statistics":
                for _, (bucket, slot) in trainer.state.optimizer._places.numbered():
                    bucket.set_exponent(slot, bucket.exponent(slot) + 20)  # type: ignore[attr-defined]
            if of != "gradients":
                trainer.state.statistics.exponents = [e + 20 for e in trainer.state.statistics.exponents]  # type: ignore[attr-defined]
        return step(batches)

    trainer.train_step = sabotaged  # type: ignore[method-assign]
    trainer.fit()
    (repeat,) = trainer.observer.repeats  # type: ignore[attr-defined]
    assert (repeat["epoch"], repeat["step"]) == (0, 2)
    assert ("batch norm's statistics" if of == "statistics" else "gradients of") in repeat["reason"]
    assert [r["step"] for r in trainer.observer.training] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
    assert largest_difference(trainer.model, undisturbed.model) < 1e-12


@pytest.mark.parametrize("reproducible", [False, True])
def test_an_image_that_is_alone_where_batch_norm_needs_two(reproducible: bool) -> None:
    """Two images for 4 workers, at a last feature map of 1 × 1 pixel; torch alone raises there.

    The variance of one value is 0, so its batch norm gives β, and only β gets a gradient from there.
    """
    recipe = small_recipe(
        image_size=4, last_batch="keep", per_gpu_batch=37, epochs=1, flip=0.0, reproducible=reproducible, momentum=0.0,
        nesterov=False, weight_decay=0.0,
    )  # fmt: skip
    trainer = make_trainer(recipe)
    assert [len(trainer.plan.positions(1, worker)) for worker in range(4)] == [0, 1, 0, 1]
    run_steps(trainer, 1)
    plain = copy.deepcopy(trainer.model).train()
    plain.zero_grad()
    before = [p.detach().clone() for p in plain.parameters()]
    with trainer.batches() as batches:
        alone = list(batches)
    raising = build_model("resnet8", 5, seed=0).double().train()
    last = plain.stages[-1].bn2  # type: ignore[index, union-attr]
    for x, y in alone:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            raising(x.double())
        logits = plain(x.double())
        (F.cross_entropy(logits, y, reduction="sum") / len(alone)).backward()
    assert last.weight.grad.eq(0).all()
    assert last.bias.grad.ne(0).any()
    with trainer.batches() as batches:
        trainer.train_step(batches)
    for p, old, new in zip(plain.parameters(), before, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(new, old - trainer.schedule(1) * p.grad, rtol=1e-9, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("reproducible", [False, True])
def test_recomputed_statistics_are_the_mean_over_their_microbatches(reproducible: bool) -> None:
    """45 images in microbatches of 8, that is six of 7 or 8; the statistics of each count as its images do."""
    recipe = small_recipe(recompute_bn=45, epochs=1, reproducible=reproducible)
    trainer = make_trainer(recipe)
    run_steps(trainer, 4)
    seen: list[torch.Tensor] = []
    handle = trainer.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer._recompute_statistics()
    trainer.state.statistics.publish(trainer.step)
    handle.remove()
    assert sorted(map(len, seen)) == [7, 7, 7, 8, 8, 8]
    plain = copy.deepcopy(trainer.model).train()
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    sums = [torch.zeros_like(buffer) for n in norms for buffer in (n.running_mean, n.running_var)]  # type: ignore[arg-type]
    for x in seen:
        plain(x)
        for total, buffer in zip(
            sums, (b for n in norms for b in (n.running_mean, n.running_var)), strict=True
        ):
            total += buffer * len(x) / 45  # type: ignore[operator]
    ours = [m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for total, buffer in zip(sums, (b for n in ours for b in (n.running_mean, n.running_var)), strict=True):
        torch.testing.assert_close(buffer, total, rtol=1e-12, atol=1e-13)


def test_recomputing_statistics_leaves_training_alone() -> None:
    trainers = [make_trainer(small_recipe(recompute_bn=n, eval_every="2steps", epochs=1)) for n in (None, 45)]
    for trainer in trainers:
        trainer.fit()
    pairs = zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    first, second = (t.observer.evaluations for t in trainers)  # type: ignore[attr-defined]
    assert [e["step"] for e in first] == [1, 3]
    assert first != second


def test_a_kernel_that_has_no_deterministic_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Put(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.fc(x.mean((2, 3)))
            return out.put(torch.arange(2), torch.zeros(2, dtype=x.dtype))

    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: Put())
    with pytest.raises(UserError, match="resnet8 uses put_, which has no deterministic kernel"):
        make_trainer(small_recipe(reproducible=True)).fit()
    assert not torch.are_deterministic_algorithms_enabled()
    make_trainer(small_recipe()).fit()


@pytest.mark.slow
def test_a_stop_ends_the_run_with_a_checkpoint_after_the_step(tmp_path: Path) -> None:
    recipe = small_recipe(precision="fp32", reproducible=True, log_every=3)
    whole = make_trainer(recipe, store=CheckpointStore(tmp_path / "whole"))
    whole.fit()
    asked: list[int] = []
    run = make_trainer(
        recipe,
        store=CheckpointStore(tmp_path / "run"),
        stop_requested=lambda: asked.append(0) or (15 if len(asked) == 5 else 0),  # type: ignore[func-returns-value]
    )
    run.fit()
    assert (run.step, run.stopped_by) == (5, 15)
    resumed = make_trainer(recipe, store=run.store, checkpoint=open_checkpoint(tmp_path / "run" / "last"))
    assert resumed.step == 5
    resumed.fit()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "whole" / "last" / name).read_bytes() == (
            tmp_path / "run" / "last" / name
        ).read_bytes()
    records = [r["loss"] for t in (run, resumed) for r in t.observer.training]  # type: ignore[attr-defined]
    assert records == [r["loss"] for r in whole.observer.training]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_save_left_out")
def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    recipe = small_recipe(checkpoint_every="10min", epochs=1)
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path, keep=9))
    trainer.save_due.seconds = 0.0
    trainer.fit()
    assert [r["step"] for r in trainer.observer.checkpoints] == [0, 1, 2, 3]  # type: ignore[attr-defined]
    rare = make_trainer(recipe, store=CheckpointStore(tmp_path / "rare", keep=9))
    rare.fit()
    assert [r["step"] for r in rare.observer.checkpoints] == [3]  # type: ignore[attr-defined]
