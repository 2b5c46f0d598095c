"""fp16: the first scale, what a step does that is skipped, and the scaler's state in checkpoints."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_trainer, run_steps, small_data, small_recipe
from together import together

from hvd_lb.errors import UserError
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World

TOO_LARGE = 2.0**100


def half(**changes: Any) -> Recipe:
    return small_recipe(precision="fp16", **changes)


def state_of(trainer: Trainer) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Weights, velocities, and the learning rates that these are in terms of."""
    optimizer = trainer.state.optimizer
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    kept = [optimizer.state[p] for p in trainer.model.parameters()]
    return weights, [of["velocity"].clone() for of in kept], [of["reference_lr"] for of in kept]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def take_step(trainer: Trainer) -> None:
    """As `Trainer.fit`: with a scale, the first sums in fixed point are larger than what is expected of them."""
    while True:
        try:
            return run_steps(trainer, 1)
        except FixedPointOverflow:
            continue


@pytest.mark.parametrize(("images", "scale"), [(1, 2**16), (2, 2**15), (5, 2**13), (8, 2**13), (9, 2**12)])
def test_the_first_scale_is_that_of_a_mean(images: int, scale: float) -> None:
    """torch's own, 2¹⁶, is for the mean loss of a microbatch; ours is the sum over at most so many images."""
    trainer = make_trainer(half(gpus=2, per_gpu_batch=images))
    assert trainer.state.scaler.get_scale() == scale


def test_other_precisions_scale_nothing() -> None:
    for precision in ("fp64", "fp32", "bf16"):
        assert make_trainer(small_recipe(precision=precision)).state.scaler.get_scale() == 1


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_gradients_are_clipped_in_their_own_scale(clip: float) -> None:
    """What the optimizer gets is what it gets in fp32, and not 2¹³ times less."""
    found: list[float] = []
    for recipe in (half(clip_norm=clip), small_recipe(precision="fp32", clip_norm=clip)):
        trainer = make_trainer(recipe)
        parameters = list(trainer.model.parameters())

        def note(*_: object, parameters: list[torch.nn.Parameter] = parameters) -> None:
            found.append(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None) ** 0.5)

        trainer.state.optimizer.optimizer.register_step_pre_hook(note)
        run_steps(trainer, 1)
    assert found == pytest.approx([found[1]] * 2, rel=0.03)
    assert found[1] == pytest.approx(clip, rel=1e-3) if clip < 1 else found[1] > 0.05


@pytest.mark.slow
def test_a_skipped_step_leaves_weights_and_velocity_and_counts_as_a_step() -> None:
    """The scale is halved; running statistics have seen the images, as in torch; the next learning rate is the next."""
    recipe = half(schedule="cosine", epochs=2)
    trainer, undisturbed = make_trainer(recipe), make_trainer(recipe)
    rates: list[float] = []
    inner = trainer.state.optimizer.optimizer
    inner.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.model.train()
    undisturbed.model.train()
    with trainer.batches() as batches, undisturbed.batches() as others:
        for step in range(4):
            undisturbed.train_step(others)
            before = state_of(trainer) if step else None
            if step == 2:
                trainer.state.scaler.update(TOO_LARGE)
            trainer.train_step(batches)
            if step == 1:
                assert equal(state_of(trainer)[0], state_of(undisturbed)[0])
                statistics = [share.clone() for share in trainer.state.statistics._share]
            if step == 2:
                assert before
                after = state_of(trainer)
                assert equal(before[0], after[0])
                assert equal(before[1], after[1])
                assert before[2] == after[2]
                assert trainer.state.scaler.get_scale() == TOO_LARGE / 2
                assert equal(trainer.state.statistics._share, undisturbed.state.statistics._share)
                assert not equal(trainer.state.statistics._share, statistics)
                trainer.state.scaler.update(2.0**13)
            elif before:
                assert not equal(before[0], state_of(trainer)[0])
    assert (trainer.step, trainer.state.loss_images) == (4, 4 * 32)
    assert rates == [trainer.schedule(step) for step in (0, 1, 3)]
    assert len(set(rates)) == 3
    assert state_of(trainer)[2] == [1.0] * len(before[2])


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 0.05}, {"channels_last": True, "nesterov": False}])
def test_a_kernel_skips_what_the_host_would(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and the host does not look whether a step is to be skipped."""
    by_kernel, by_host = (make_trainer(half(learning_rate=0.1, **changes)) for _ in range(2))
    by_host.state.optimizer._skip_on_device = False
    looked: list[object] = []
    look = torch.amp.GradScaler._maybe_opt_step

    def noted(scaler: torch.amp.GradScaler, optimizer: Any, *more: Any) -> Any:
        looked.append(optimizer)
        return look(scaler, optimizer, *more)

    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", noted)
    for step in range(4):
        before = state_of(by_kernel) if step else None
        for trainer in (by_kernel, by_host):
            if step == 2:
                trainer.state.scaler.update(TOO_LARGE)
            run_steps(trainer, 1)
            if step == 2:
                assert trainer.state.scaler.get_scale() == TOO_LARGE / 2
                trainer.state.scaler.update(2.0**13)
        for found, expected in zip(state_of(by_kernel)[:2], state_of(by_host)[:2], strict=True):
            assert equal(found, expected)
        assert before is None or equal(before[0], state_of(by_kernel)[0]) == (step == 2)
    assert looked == [by_host.state.optimizer] * 4


@pytest.mark.slow
def test_a_skipped_step_is_resumed_as_it_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With growth every second step and an overflow in step 1, a run from each checkpoint has the bits of the whole."""
    scaler = torch.amp.GradScaler

    def growing(*arguments: Any, **options: Any) -> torch.amp.GradScaler:
        return scaler(*arguments, **options, growth_interval=2)

    monkeypatch.setattr(torch.amp, "GradScaler", growing)
    recipe = half(epochs=2, checkpoint_every="1steps", log_every=3)
    whole = make_trainer(recipe, store=CheckpointStore(tmp_path / "whole", keep=9))
    monkeypatch.undo()
    step = whole.train_step

    def sabotaged(batches: Any) -> bool:
        if whole.step == 1:
            whole.state.scaler.update(TOO_LARGE)
        if whole.step == 2:
            whole.state.scaler.update(2.0**9)
        return step(batches)

    whole.train_step = sabotaged  # type: ignore[method-assign]
    whole.fit()
    scales = [open_checkpoint(path).saved.scaler for path in reversed(whole.store.newest_first())]  # type: ignore[union-attr]
    # One good step; too large; good steps 2 and 3, and so on, each pair of which doubles the scale.
    assert [of["scale"] for of in scales] == [
        2.0**13, TOO_LARGE / 2, 2.0**9, 2.0**10, 2.0**10, 2.0**11, 2.0**11, 2.0**12,
    ]  # fmt: skip
    assert [of["_growth_tracker"] for of in scales] == [1, 0, 1, 0, 1, 0, 1, 0]
    for first in (3, 5):
        resumed = make_trainer(
            recipe,
            store=CheckpointStore(tmp_path / f"{first}"),
            checkpoint=open_checkpoint(tmp_path / "whole" / f"step-{first:08d}"),
        )
        assert resumed.state.scaler.state_dict() == scales[first - 1]
        resumed.fit()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            files = [tmp_path / run / "last" / name for run in ("whole", f"{first}")]
            assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("reproducible", [False, True])
def test_all_processes_skip_a_step_that_overflows_on_one(
    reproducible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = build_model("resnet8", 5, seed=0)
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))

    def run(world: World) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
        trainer = Trainer(
            half(gpus=3, reproducible=reproducible), small_data(), world, device=torch.device("cpu"), threads=1,
            observer=SilentObserver(),
        )  # fmt: skip
        take_step(trainer)
        before, scale = state_of(trainer)[0], trainer.state.scaler.get_scale()
        forward = trainer.forward.network
        if world.rank == 1:
            trainer.forward.network = lambda x: forward(x) * torch.inf
        take_step(trainer)
        return before, state_of(trainer)[0], trainer.state.scaler.get_scale() / scale

    for before, after, backoff in together(3, run):
        assert equal(before, after)
        assert backoff == 0.5


@pytest.mark.slow
def test_gradients_that_overflow_for_ever_end_the_run() -> None:
    """The loss is a number all the while; without that the run would go to its end with the weights it began with."""
    trainer = make_trainer(half(log_every=2))
    next(trainer.model.parameters()).register_hook(lambda grad: grad * math.inf)
    trainer.state.scaler.update(2.0**-13)
    with pytest.raises(UserError, match="in every step up to step 3, .*: give --precision bf16 or fp32"):
        trainer.fit()
