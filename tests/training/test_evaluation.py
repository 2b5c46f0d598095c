"""The evaluation's figures against a plain loop that sorts, on any number of processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from together import together
from torch import nn

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import Loaders
from hvd_lb.plan.augment import CentreWindows, Origin
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.bad_images import BadImages
from hvd_lb.training.evaluation import Evaluation, Evaluator
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

CPU = torch.device("cpu")
LEVELS = Preprocessing(4, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), True)


def numbered(count: int, classes: int, seed: int = 0) -> ArrayImages:
    """Images each of one level, its number; labels at random."""
    labels = np.random.default_rng(seed).integers(0, classes, count)
    pixels = np.arange(count, dtype=np.uint8).repeat(16).reshape(count, 4, 4)
    return ArrayImages(pixels, labels, [f"{number:02d}" for number in range(classes)], "numbered")


def table_of(count: int, classes: int) -> torch.Tensor:
    return torch.randn(count, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3


def evaluate(
    images: ArrayImages,
    table: torch.Tensor,
    batch_size: int,
    world: World,
    before_batch: Callable[[int, int], int] = lambda done, of: 0,
) -> Evaluation:
    """Of a model that gives for each image its line of the table."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return table[x[:, 0, 0, 0].round().long()]

    loaders = Loaders("torchvision", images, LEVELS, batch_size=batch_size, device=CPU, threads=1)
    bad_images = BadImages(world, False, 0.0, lambda records: None)
    evaluator = Evaluator(
        loaders, CentreWindows(1.0), CPU, torch.float64, torch.contiguous_format, bad_images
    )
    return evaluator(forward, world, nullcontext(), Origin("eval", 0, 0, 0), before_batch)


def plain(labels: list[int], table: list[list[float]]) -> Evaluation:
    wrong, wrong_among_five, loss = 0, 0, 0.0
    for label, scores in zip(labels, table, strict=True):
        ranking = sorted(range(len(scores)), key=lambda of: -scores[of])
        wrong += ranking[0] != label
        wrong_among_five += label not in ranking[:5]
        loss += math.log(sum(map(math.exp, scores))) - scores[label]
    count = len(labels)
    return Evaluation(100 * wrong / count, 100 * wrong_among_five / count, loss / count, count)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 8, 9, 45, 64])
def test_figures_are_those_of_a_plain_loop(batch_size: int, processes: int) -> None:
    """45 images of 12 classes; in batches of 8 the last has 5, in batches of 45 all but one process have none."""
    images, table = numbered(45, 12), table_of(45, 12)
    expected = plain(images.labels.tolist(), table.tolist())
    assert 0 < expected.top5_error < expected.top1_error < 100
    found = together(processes, lambda world: evaluate(images, table, batch_size, world))
    assert len(set(found)) == 1
    assert (found[0].images, found[0].top1_error) == (45, pytest.approx(expected.top1_error, rel=1e-12))
    assert found[0].top5_error == pytest.approx(expected.top5_error, rel=1e-12)
    assert found[0].loss == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_formed_in_double_whatever_the_logits_are(dtype: torch.dtype) -> None:
    images, table = numbered(45, 12), table_of(45, 12).to(dtype)
    found = evaluate(images, table, 8, Solo())
    assert found.loss == pytest.approx(plain(images.labels.tolist(), table.tolist()).loss, rel=1e-12)


def test_no_bit_depends_on_the_processes() -> None:
    images, table = numbered(45, 12), table_of(45, 12)
    alone = evaluate(images, table, 4, Solo())
    assert {*together(5, lambda world: evaluate(images, table, 4, world))} == {alone}


@pytest.mark.parametrize("place", range(7))
def test_a_label_counts_by_its_place_in_the_ranking(place: int) -> None:
    """Scores fall from class 0 to class 11, and every label is that of one place."""
    images = numbered(6, 12)
    images.labels = np.full(6, place, np.int64)
    found = evaluate(images, -torch.arange(12.0).double().repeat(6, 1), 4, Solo())
    assert found.top1_error == (0 if place == 0 else 100)
    assert found.top5_error == (0 if place < 5 else 100)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_with_few_classes_the_label_is_always_among_five(classes: int) -> None:
    found = evaluate(numbered(20, classes), table_of(20, classes), 8, Solo())
    assert found.top5_error == 0


class Dropping(nn.Module):
    """What tells training from evaluation: dropout, and batch norm with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 16, 12)
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return self.fc(nn.functional.dropout(self.norm(x).flatten(1), 0.5, self.training))


class Evaluations(SilentObserver):
    def __init__(self) -> None:
        self.of: list[dict[str, Any]] = []
        self.how_far: list[tuple[int, int, int, str]] = []

    def evaluating(self, step: int, done: int, of: int, what: str = "evaluation") -> None:
        self.how_far.append((step, done, of, what))

    def evaluation(self, record: dict[str, Any]) -> None:
        self.of.append(record)


@pytest.mark.parametrize(
    ("changes", "before", "passes"), [({"recompute_bn": 16}, 2, 1), ({"ema": 0.5}, 0, 2)], ids=str
)
def test_how_far_it_is_is_told_before_each_batch(changes: dict[str, Any], before: int, passes: int) -> None:
    """Also of what comes before it, and over both passes where there are averaged weights."""
    recipe = Recipe(
        model="resnet8", image_size=8, gpus=2, per_gpu_batch=8, epochs=1, precision="fp32", warmup="none",
        **changes,
    )  # fmt: skip
    train, val = noise(32, 0, 8), noise(29, 1, 8)
    told = Evaluations()
    Trainer(recipe, Dataset("noise", train, val), Solo(), device=CPU, threads=1, observer=told).fit()
    assert told.how_far == [
        *((1, done, before, "batch norm's statistics") for done in range(before)),
        *((1, done, 4 * passes, "evaluation") for done in range(4 * passes)),
    ]


def test_each_process_tells_of_its_own_batches() -> None:
    shares = together(2, lambda world: asked(world))
    assert shares == [[(0, 1)], [(0, 2), (1, 2)]]


def asked(world: World) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    evaluate(numbered(10, 4), table_of(10, 4), 4, world, lambda done, of: told.append((done, of)) or 0)  # type: ignore[func-returns-value]
    return told


def noise(count: int, seed: int, size: int = 4) -> ArrayImages:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, count)
    pixels = rng.integers(0, 100, (count, size, size, 3)) + 12 * labels[:, None, None, None]
    return ArrayImages(pixels.astype(np.uint8), labels, [f"{number:02d}" for number in range(12)], "noise")


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_trainer_evaluates_the_model_as_it_is(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode, with the statistics of that moment, without label smoothing; training mode comes back."""
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: Dropping())
    train, val = noise(64, 0), noise(29, 1)
    recipe = Recipe(
        model="resnet8", image_size=4, gpus=2, per_gpu_batch=8, epochs=2, precision="fp64", eval_crop=1.0,
        learning_rate=0.5, label_smoothing=smoothing, warmup="none", together=1,
    )  # fmt: skip
    told = Evaluations()
    trainer = Trainer(recipe, Dataset("noise", train, val), Solo(), device=CPU, threads=1, observer=told)
    trainer.fit()
    model = trainer.model
    assert model.modes == ([True] * 8 + [False] * 4) * 2  # type: ignore[comparison-overlap]
    assert model.training
    assert [record["step"] for record in told.of] == [3, 7]
    trainer.state.statistics.publish(trainer.step)
    x = torch.from_numpy(np.stack(val.read(np.arange(29)))).double().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1)
    expected = plain(val.labels.tolist(), model.eval()(x).tolist())
    last = told.of[-1]
    assert (last["images"], last["top1_error"]) == (29, pytest.approx(expected.top1_error))
    assert last["top5_error"] == pytest.approx(expected.top5_error)
    assert last["loss"] == pytest.approx(expected.loss, rel=1e-6)  # tensors of images are fp32


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_whole_runs_evaluate_alike_on_any_number_of_processes(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five batches on one to three processes, by the trainer itself."""
    fresh = build_model("resnet8", 12, seed=0)  # threads share torch's random numbers
    monkeypatch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))
    recipe = Recipe(
        model="resnet8", image_size=4, gpus=3, per_gpu_batch=6, epochs=2, precision="fp64", eval_crop=1.0,
        learning_rate=0.2, last_batch="keep", warmup="none", reproducible=True,
    )  # fmt: skip
    data = Dataset("noise", noise(40, 0), noise(29, 1))

    def run(world: World) -> Evaluation | None:
        return Trainer(recipe, data, world, device=CPU, threads=1, observer=Evaluations()).fit()

    alone = run(Solo())
    assert alone is not None
    assert alone.images == 29
    found = together(processes, run)
    assert found == [alone] * processes


@pytest.mark.parametrize(
    ("every", "evaluated"),
    [("1epoch", [3, 7, 9]), ("never", [9]), ("4steps", [3, 7, 9]), ("5steps", [4, 9]), ("9steps", [8, 9])],
)
def test_evaluations_have_their_period_and_there_is_one_at_the_end(every: str, evaluated: list[int]) -> None:
    """10 of 12 steps, 4 an epoch."""
    recipe = Recipe(
        model="resnet8", image_size=4, gpus=2, per_gpu_batch=8, epochs=3, steps=10, eval_crop=1.0, eval_every=every,
    )  # fmt: skip
    told = Evaluations()
    Trainer(
        recipe, Dataset("noise", noise(64, 0), noise(9, 1)), Solo(), device=CPU, threads=1, observer=told
    ).fit()
    assert [record["step"] for record in told.of] == evaluated
