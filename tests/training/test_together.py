"""Virtual workers computed together are what they are apart: in fp64, to rounding, in everything that a run keeps."""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu import EmulatedProgram
from test_trainer import CPU, Records, largest_difference, make_trainer, run_steps, small_data, small_recipe
from together import together
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from hvd_lb.errors import UserError
from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.kernels.batch_norm import GroupBatchNorm
from hvd_lb.recipe import Recipe
from hvd_lb.training.batchnorm import RunningStatistics, allow_single_values, running_statistics
from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.forward import Forward
from hvd_lb.training.models import build_model
from hvd_lb.training.together.group import Group, draw_apart
from hvd_lb.training.together.size import GroupSize
from hvd_lb.training.together.strange import strange
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo


def after(steps: int, **changes: Any) -> Trainer:
    trainer = make_trainer(small_recipe(**changes))
    done = 0
    while done < steps:
        try:
            run_steps(trainer, steps - trainer.step)
        except FixedPointOverflow:
            continue
        done = trainer.step
    return trainer


def assert_the_same(found: Trainer, apart: Trainer, most: float = 1e-12) -> None:
    assert largest_difference(found.model, apart.model) < most
    assert (found.state.losses - apart.state.losses).abs().max() < 100 * most  # sums over images
    assert found.state.losses.ne(0).tolist() == apart.state.losses.ne(0).tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("changes", [{}, {"channels_last": True}, {"gpus": 7, "per_gpu_batch": 4}])
def test_an_epoch_with_a_short_last_step(size: int, changes: dict[str, Any]) -> None:
    """Its 22 images make workers of 5 and 6 images, or of 3 and 4; each has its own loss."""
    recipe = {"last_batch": "keep", **changes}
    apart, found = after(5, together=1, **recipe), after(5, together=size, **recipe)
    assert found.forward.group_size.size == size
    assert_the_same(found, apart)


@pytest.mark.parametrize("changes", [{}, {"channels_last": True, "reproducible": True}])
def test_an_epoch_with_the_batch_norm_of_gpus(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose kernels are computed here thread by thread; workers with different numbers of images do without."""
    calls = []

    class Counted(GroupBatchNorm):
        def __call__(self, x: Tensor, workers: int, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
            calls.append((len(x), workers))
            return super().__call__(x, workers, *more)

    def find(forward: Forward) -> None:
        forward.group.batch_norm = Counted(CPU, EmulatedProgram, 8)

    recipe = {"last_batch": "keep", **changes}
    apart = after(5, together=1, **recipe)
    monkeypatch.setattr(Forward, "_find_batch_norm", find)
    found = after(5, together=4, **recipe)
    assert_the_same(found, apart)
    sizes = {size for size, _ in calls}
    assert 4 * 8 in sizes
    assert 22 not in sizes


def test_workers_without_images_and_with_a_single_one() -> None:
    """Of 7 images for 8 workers in the last step."""
    for size in (2, 3, 8):
        trainers = [
            make_trainer(
                small_recipe(gpus=8, per_gpu_batch=4, last_batch="keep", together=of), small_data(39)
            )
            for of in (1, size)
        ]
        for trainer in trainers:
            run_steps(trainer, 2)
        assert_the_same(trainers[1], trainers[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes", "most"),
    [
        ("mobilenet_v3_small", {"image_size": 32}, 1e-12),
        ("efficientnet_b0", {"image_size": 64}, 1e-10),  # whose squeezes amplify rounding
        ("densenet121", {"image_size": 32}, 1e-12),
        ("squeezenet1_1", {"image_size": 32}, 1e-12),
        ("googlenet", {"image_size": 64}, 1e-12),
    ],
)
def test_models(model: str, changes: dict[str, Any], most: float) -> None:
    """Among them such with dropout and stochastic depth, and without batch norm."""
    recipe = {"model": model, "gpus": 3, "per_gpu_batch": 4, "learning_rate": 0.02, **changes}
    assert_the_same(after(2, together=2, **recipe), after(2, together=1, **recipe), most)


def small_transformer(attention_dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        32, 8, 2, 2, 32, 64, dropout=0.1, attention_dropout=attention_dropout, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)  # which begins with zeros
    return model


def test_a_transformer_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"image_size": 32, "learning_rate": 0.02}
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: small_transformer())
    assert_the_same(after(2, together=3, **recipe), after(2, together=1, **recipe))
    # That of the attention's weights is drawn inside torch's attention.
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: small_transformer(0.1))
    with pytest.raises(UserError, match="self_attention"):
        after(2, together=3, **recipe)


class Dropping(nn.Module):
    """Every kind of dropout, in place and not, after batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(0.3), nn.Dropout(0.2, inplace=True), nn.SELU(),
            nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1), nn.Flatten(), nn.Dropout1d(0.5), nn.Linear(288, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def gradients(model: nn.Module, losses: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters())))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_worker_draws_its_own(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, group = Dropping().double(), Group()
    model.to(memory_format=memory_format)
    sizes, seeds = [4, 3, 5], [11, 12, 13]
    images = torch.randn(12, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    apart = copy.deepcopy(model)
    assert draw_apart(model, group)
    RunningStatistics(model, Solo(), group)
    expected = []
    for part, seed in zip(images.split(sizes), seeds, strict=True):
        torch.manual_seed(seed)
        expected.append(apart(part).square().sum())
    group.begin(sizes, seeds)
    found = [part.square().sum() for part in model(images).split(sizes)]
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-13)
    for one, other in zip(gradients(model, found), gradients(apart, expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)


class Recomputed(nn.Module):
    """A user's own network, with activation checkpointing around dropout and batch norm."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Dropout2d(0.3), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 5))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.head(self.second(self.first(x)))
        x = checkpoint(self.first, x.detach().requires_grad_(), use_reentrant=self.reentrant)
        return self.head(checkpoint(self.second, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_again(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(size: int, reentrant: bool | None) -> Trainer:
        monkeypatch.setattr(
            "hvd_lb.training.forward.build_model", lambda *args, **kwargs: Recomputed(reentrant)
        )
        return after(3, together=size)

    apart = trained(1, None)
    for size in (1, 2, 4):
        assert_the_same(trained(size, reentrant), apart)


def test_activation_checkpointing_without_its_random_numbers() -> None:
    model, group = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), Group()
    draw_apart(model, group)
    group.begin([2, 2], [1, 2])
    loss = checkpoint(model, torch.ones(4, 3), use_reentrant=False, preserve_rng_state=False).sum()
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        loss.backward()


@pytest.mark.parametrize("terms", [None, 16])
def test_statistics_of_a_layer_that_is_used_twice(terms: int | None) -> None:
    def layer_after(groups: list[list[Tensor]]) -> nn.Module:
        layer, group = nn.BatchNorm1d(2).double(), Group()
        statistics = running_statistics(layer, Solo(), terms, group)
        for parts in groups:
            group.begin([len(part) for part in parts], [0] * len(parts))
            layer(layer(torch.cat(parts)) * 2 + 1)
            statistics.after_forward()
        statistics.synchronize()
        statistics.step(3)
        statistics.publish()
        return layer

    torch.manual_seed(0)
    parts = [torch.randn(size, 2, dtype=torch.float64) for size in (8, 5, 7)]
    assert largest_difference(layer_after([parts]), layer_after([[part] for part in parts])) < 1e-12


def test_statistics_of_a_forward_that_was_given_up() -> None:
    layer, group = nn.BatchNorm1d(2), Group()
    statistics = RunningStatistics(layer, Solo(), group)
    before = copy.deepcopy(layer)
    for sizes in ([4], [2, 2]):
        group.begin(sizes, [0] * len(sizes))
        layer(torch.randn(4, 2))
        statistics.discard()
        statistics.publish()
        assert largest_difference(layer, before) == 0


# What cannot be computed together


class Centring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Deciding(nn.Module):
    """How often it calls a layer depends on all images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(x.abs().mean() > 0.7)):
            x = self.layer(x)
        return x


class OfSix(nn.Module):
    """Has a table with as many rows as two workers have images."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.ones(6, 8)).mean()


class Remembering(nn.Module):
    """Follows the mean of what it sees, and makes another tensor of it; it is not used in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Centring(), "1 mixes images"),
        (Deciding(), "1.layer is called more often for some images"),
        (OfSix(), ""),
        (Remembering(), "its buffer 1.mean is changed by each forward"),
        (nn.InstanceNorm2d(8, track_running_stats=True), "its buffer 1.running_mean is changed"),
        (spectral_norm(nn.Conv2d(8, 8, 1)), "its buffer 1.parametrizations.weight.0._u is changed"),
        (Noisy(), "1 mixes images, or draws"),
        (nn.BatchNorm2d(8, track_running_stats=False), "1 mixes images"),
        (nn.Unflatten(0, (3, -1)), "fails on two at a time"),
        (nn.Dropout(0.5, inplace=True), ""),
        (nn.BatchNorm2d(8), ""),
        (nn.GroupNorm(2, 8), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_modules_are_found_by_numbers(module: nn.Module, why: str) -> None:
    """Each is used twice, the second time behind a branch that is multiplied by zero."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), module, nn.ReLU(), module, nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(3, 3, 8, 8))
    nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    group = Group()
    draw_apart(model, group)
    statistics = RunningStatistics(model, Solo(), group)
    before = copy.deepcopy(model)
    found = strange(model.train(), group, (3, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    assert why in found
    assert bool(found) is bool(why)
    statistics.discard()
    assert largest_difference(model, before) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("model", "images", "size"), [("googlenet", 1, 64), ("efficientnet_b0", 2, 32)])
def test_rounding_that_batch_norm_makes_large_is_no_mixing(model: str, images: int, size: int) -> None:
    """Of maps of 1 × 1 and 2 × 2 pixels it has a few values, nearly equal: the last bit decides about all of them."""
    network, group = build_model(model, 10, seed=1).train(), Group()
    allow_single_values(network)
    draw_apart(network, group)
    RunningStatistics(network, Solo(), group)
    shape = images, 3, size, size
    assert not strange(network, group, shape, torch.zeros(1, 3, 8, 8))
    # What does mix images is found in it all the same.
    network.avgpool = nn.Sequential(network.avgpool, Centring())
    assert "mixes images" in strange(network, group, shape, torch.zeros(1, 3, 8, 8))


def test_a_network_that_mixes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it is left apart, and that is told; to ask for more is an error."""
    fresh = nn.Sequential(build_model("resnet8", 5, seed=0), Centring())
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))
    with pytest.raises(UserError, match=r"--together 2: .*module 1 mixes images.*leave the option out"):
        make_trainer(small_recipe(together=2))
    trainer = make_trainer(small_recipe(together="auto"))
    run_steps(trainer, 2)
    (record,) = trainer.observer.groups  # type: ignore[attr-defined]
    assert record["together"] == 1
    assert "mixes images" in record["why"]


def test_where_a_run_does_not_look_for_a_size_by_itself() -> None:
    for changes in ({"reproducible": True}, {"compile": True}, {"precision": "fp16"}):
        trainer = make_trainer(small_recipe(together="auto", **changes))
        assert trainer.forward.group_size.most == 1
    with pytest.raises(UserError, match="dropout cannot be compiled so"):
        make_trainer(small_recipe(model="squeezenet1_1", image_size=32, compile=True, together=2))


# How many


def tried(
    workers: int,
    seconds: dict[int, float],
    room: float = 1e12,
    images: int = 8,
    burst: range = range(0),
    steps: int = 60,
) -> GroupSize:
    """Of which a group of so many takes so long, and ten times that in a burst of other work, counted in groups."""
    size = GroupSize(range(5, 5 + workers), None, images=images, device=CPU, room=lambda: room)
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        turn = 0
        for _ in range(steps):
            for group in size.groups(range(5, 5 + workers)):
                with size.timed(images * len(group)):
                    x = torch.ones(250, requires_grad=True)
                    (x.exp() * 2).sum().backward()  # keeps 1,000 bytes
                    now[0] += seconds.get(len(group), 9.0) * (10 if turn in burst else 1)
                turn += 1
    assert size.speeds
    return size


def test_the_fastest_size_is_found() -> None:
    found = tried(8, {1: 1.0, 2: 1.5, 4: 2.8, 8: 6.0})
    assert found.size == 4
    assert found.speeds == pytest.approx({1: 8, 2: 16 / 1.5, 4: 32 / 2.8, 8: 64 / 6})
    assert tried(8, {1: 1.0, 2: 2.0, 4: 3.9, 8: 7.8}).size == 1  # what is no faster is not worth its memory
    assert tried(8, {1: 1.0, 2: 2.2, 4: 3.0, 8: 5.0}).size == 8  # it gets worse at first
    assert tried(5, {1: 1.0, 2: 1.8, 3: 2.4, 5: 3.0}).size == 5


@pytest.mark.parametrize("first", range(0, 30, 3))
def test_a_burst_of_other_work_meets_all_sizes(first: int) -> None:
    times = {1: 1.0, 2: 1.3, 4: 1.8, 8: 2.5}
    assert tried(8, times, burst=range(first, first + 12)).size == 8


def test_steps_of_many_workers_try_all_within_a_few() -> None:
    assert tried(64, {1: 1.0, 2: 1.3, 4: 1.8, 8: 2.5}, images=32, steps=3).size == 8


def test_short_times_are_taken_more_often() -> None:
    size = GroupSize(range(2), None, images=8, device=CPU)
    now, runs = [0.0], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        while size.searching:
            for group in size.groups(range(2)):
                with size.timed(8 * len(group)):
                    now[0] += 0.001 * len(group)
                runs += 1
    assert runs > 100


def test_no_size_is_tried_that_has_no_room() -> None:
    faster = {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0}
    assert list(tried(8, faster, room=3500).speeds) == [1, 2]
    assert list(tried(8, faster, room=7000).speeds) == [1, 2, 4]
    assert list(tried(8, faster, images=64).speeds) == [1, 2, 4]  # 256 images are enough


def test_one_worker_has_nothing_to_be_found() -> None:
    assert GroupSize(range(3, 4), None, images=8, device=CPU).most == 1
    assert GroupSize(range(2), None, images=200, device=CPU).most == 1
    assert GroupSize(range(4), 8, images=200, device=CPU).most == 4


def test_a_run_finds_it_and_tells_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_lb.training.together.size._SECONDS", 0.0)
    trainer = make_trainer(small_recipe(learning_rate=0.1, together="auto", epochs=8))
    apart = make_trainer(small_recipe(learning_rate=0.1, together=1, epochs=8))
    for of in (trainer, apart):
        run_steps(of, 30)
    (record,) = trainer.observer.groups  # type: ignore[attr-defined]
    assert record["together"] == trainer.forward.group_size.size
    assert not record["why"]
    assert list(record["images_per_second"])[:2] == ["1", "2"]
    assert apart.observer.groups == []  # type: ignore[attr-defined]
    assert_the_same(trainer, apart)


# Several processes, reproducible runs, runs that go on


@pytest.fixture
def one_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share torch's random numbers."""
    fresh = build_model("resnet8", 5, seed=0)
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))


def of_processes(processes: int, recipe: Recipe, folder: Path | None = None) -> list[Trainer]:
    def run(world: Any) -> Trainer:
        trainer = Trainer(
            recipe, small_data(), world, device=CPU, threads=1, observer=Records(),
            store=CheckpointStore(folder) if folder else None,
            checkpoint=open_checkpoint(folder / "last") if folder and (folder / "last").exists() else None,
        )  # fmt: skip
        trainer.fit()
        trainer.state.statistics.publish()
        return trainer

    return together(processes, run)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["auto", 2, 3])
@pytest.mark.usefixtures("one_initialisation")
def test_processes(size: int | str) -> None:
    recipe = {"gpus": 7, "per_gpu_batch": 4, "last_batch": "keep", "steps": 6, "log_every": 1}
    apart = of_processes(1, small_recipe(together=1, **recipe))[0]
    for processes in (1, 2, 3):
        for found in of_processes(processes, small_recipe(together=size, **recipe)):
            assert largest_difference(found.model, apart.model) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("size", "processes"), [(2, (2, 3, 4)), (3, (2, 3)), (4, (2,))])
@pytest.mark.usefixtures("one_initialisation")
def test_reproducible_groups_are_hosted_whole(size: int, processes: tuple[int, ...]) -> None:
    """The same bits on any number of processes; 7 workers, of which the last step has less images."""
    recipe = small_recipe(
        gpus=7, per_gpu_batch=4, last_batch="keep", steps=6, log_every=1, precision="fp32", reproducible=True,
        together=size, recompute_bn=30, eval_every="3steps",
    )  # fmt: skip
    alone = of_processes(1, recipe)[0]
    for count in processes:
        for rank, found in enumerate(of_processes(count, recipe)):
            assert found.workers.start % size == 0
            assert largest_difference(found.model, alone.model) == 0
            if rank == 0:
                losses = [[record["loss"] for record in of.observer.training] for of in (found, alone)]  # type: ignore[attr-defined]
                assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.usefixtures("one_initialisation")
def test_a_run_goes_on_with_other_groups(tmp_path: Path) -> None:
    recipe = {"checkpoint_every": "3steps", "last_batch": "keep"}
    whole = of_processes(1, small_recipe(steps=8, together=1, **recipe))[0]
    of_processes(1, small_recipe(steps=5, together=2, **recipe), tmp_path)
    found = of_processes(2, small_recipe(steps=8, together=4, **recipe), tmp_path)[0]
    assert largest_difference(found.model, whole.model) < 1e-12


@pytest.mark.slow
def test_a_reproducible_run_keeps_its_groups(tmp_path: Path) -> None:
    recipe = {"checkpoint_every": "3steps", "reproducible": True}
    of_processes(1, small_recipe(steps=3, together=2, **recipe), tmp_path)
    with pytest.raises(UserError, match="together: 2 → 4"):
        of_processes(1, small_recipe(steps=8, together=4, **recipe), tmp_path)


@pytest.mark.slow
def test_loss_scaling_and_minibatches_left_out(tmp_path: Path) -> None:
    """fp16 takes its steps in groups, too; a step whose loss is no number is left out as it is apart."""
    recipe = small_recipe(precision="fp16", together=4, learning_rate=0.05)
    half = make_trainer(recipe)
    run_steps(half, 4)
    assert half.state.finite(half.state.losses)
    for size in (1, 2):
        trainer = make_trainer(
            small_recipe(together=size, on_nan="rollback", steps=8, checkpoint_every="2steps", log_every=1),
            store=CheckpointStore(tmp_path / str(size)),
        )
        loss = trainer.forward.loss

        def spoilt(logits: Tensor, labels: Tensor, of: Any = trainer, real: Any = loss) -> Tensor:
            return real(logits, labels) * (float("nan") if of.step == 5 else 1.0)

        trainer.forward.loss = spoilt  # type: ignore[assignment]
        trainer.fit()
        assert trainer.state.left_out == {5}


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    recipe = {"last_batch": "keep", "learning_rate": 0.1}
    assert_the_same(after(5, together=2, compile=True, **recipe), after(5, together=1, **recipe))
