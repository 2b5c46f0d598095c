"""Processes that flip one bit of one gradient are found in the step in which it is audited, and harm nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from together import together
from torch import Tensor

from hvd_lb.audit.audit import Audit, Disagreement, Tried, Undecided
from hvd_lb.audit.draw import Draw
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe, make_recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

pytestmark = pytest.mark.slow
STEPS = 12
When = Callable[[int], bool]


@pytest.fixture(autouse=True, scope="module")
def one_initialisation() -> Iterator[None]:
    """Threads share torch's random numbers."""
    fresh = build_model("resnet8", 5, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))
        yield


def small_data() -> Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 150)
    pixels = rng.integers(0, 120, (150, 8, 8, 3)) + 25 * labels[:, None, None, None]
    images = ArrayImages(pixels.astype(np.uint8), labels, list("abcde"), "noise")
    return Dataset("small", images, images)


class Told(SilentObserver):
    def __init__(self) -> None:
        self.audits: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.bad: list[dict[str, Any]] = []

    def audit(self, record: dict[str, Any]) -> None:
        self.audits.append(record)

    def bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        self.bad += records

    def train(self, record: dict[str, Any]) -> None:
        self.losses.append(record["loss"])


def train(
    world: World, wrong: dict[int, When], images: ArrayImages | None = None, **changes: Any
) -> tuple[Trainer, Told]:
    """A run in which the processes `wrong` flip the lowest bit of one element of a gradient in some computations.

    `When` is asked at each computation of a gradient by that process, with its number.
    """
    recipe = Recipe(**{
        "model": "resnet8", "image_size": 8, "gpus": 6, "per_gpu_batch": 4, "eval_crop": 1.0, "warmup": "none",
        "epochs": 3, "steps": STEPS, "last_batch": "keep", "eval_every": "never", "log_every": 1,
        "learning_rate": 0.02, "reproducible": True, "audit": 1.0, **changes,
    })  # fmt: skip
    told = Told()
    data = Dataset("files", images, images) if images else small_data()
    trainer = Trainer(recipe, data, world, device=torch.device("cpu"), threads=1, observer=told)
    computed = 0

    def flip(gradient: Tensor) -> Tensor:
        nonlocal computed
        computed += 1
        if not wrong[world.rank](computed):
            return gradient
        bits = gradient.clone().view(torch.int32)
        bits.view(-1)[3] ^= 1
        return bits.view(torch.float32)

    if world.rank in wrong:
        trainer.model.fc.weight.register_hook(flip)
    trainer.fit()
    trainer.state.statistics.publish(trainer.step)
    return trainer, told


def state(trainer: Trainer) -> list[Tensor]:
    return [
        *trainer.model.state_dict().values(),
        *(s["velocity"] for s in trainer.state.optimizer.state.values()),
    ]


@pytest.fixture(scope="module")
def right() -> tuple[list[Tensor], list[float]]:
    torch.set_num_threads(1)
    trainer, told = train(Solo(), {})
    return state(trainer), told.losses


def assert_right(found: list[tuple[Trainer, Told]], right: tuple[list[Tensor], list[float]]) -> None:
    for trainer, _ in found:
        assert all(torch.equal(a, b) for a, b in zip(state(trainer), right[0], strict=True))
    assert found[0][1].losses == right[1]


@pytest.mark.parametrize("changes", [{}, {"together": 2}, {"together": 3, "gpus": 7}, {"audit": 0.5}])
def test_audits_change_nothing(changes: dict[str, Any], right: tuple[list[Tensor], list[float]]) -> None:
    expected = right
    if "together" in changes:
        trainer, told = train(Solo(), {}, **changes)
        expected = state(trainer), told.losses
    found = together(3, lambda world: train(world, {}, **changes))
    assert_right(found, expected)
    assert not found[0][1].audits


@pytest.mark.parametrize("liar", [0, 2])
def test_one_that_is_always_wrong_is_named_each_time_it_is_audited(
    liar: int, right: tuple[list[Tensor], list[float]]
) -> None:
    """What it computes and nobody audits stays wrong, so only steps up to the first finding are those of the run."""
    found = together(3, lambda world: train(world, {liar: lambda computed: True}))
    audits = found[0][1].audits
    assert audits == found[1][1].audits == found[2][1].audits
    trainer = found[0][0]
    expected = [s for s in range(STEPS) if (d := _draw(trainer, s)) and liar in (d.owner, d.auditor)]
    assert [record["step"] for record in audits] == expected
    assert len(expected) > 3
    for record in audits:
        assert record["liars"] == [liar]
        assert liar in (record["owner"], record["auditor"])
        assert record["moved_to"] not in (liar, None)
        assert record["third"] not in (record["owner"], record["auditor"], None)


def _draw(trainer: Trainer, step: int) -> Any:
    return trainer.audit._draw(step)


def test_one_flip_at_the_audited_moment_is_found_and_undone(right: tuple[list[Tensor], list[float]]) -> None:
    """In the first step that rank 1 audits, its own computation comes last."""
    probe = together(3, lambda world: train(world, {}))[1][0]
    step = next(s for s in range(STEPS) if _draw(probe, s).auditor == 1)
    before = sum(2 + (_draw(probe, s).auditor == 1) for s in range(step))  # it hosts 2 of 6 workers
    found = together(3, lambda world: train(world, {1: lambda computed: computed == before + 3}))
    (record,) = found[0][1].audits
    assert (record["step"], record["liars"], record["moved_to"]) == (step, [1], None)
    assert_right(found, right)


def test_of_two_the_one_that_changes_its_mind_was_wrong(right: tuple[list[Tensor], list[float]]) -> None:
    probe = together(2, lambda world: train(world, {}))[0][0]
    step = next(s for s in range(STEPS) if _draw(probe, s).owner == 0)
    drawn = _draw(probe, step)
    before = sum(3 + (_draw(probe, s).auditor == 0) for s in range(step))
    at = before + 1 + drawn.workers[0]
    found = together(2, lambda world: train(world, {0: lambda computed: computed == at}))
    (record,) = found[0][1].audits
    assert (record["step"], record["liars"], record["third"], record["moved_to"]) == (step, [0], None, None)
    assert_right(found, right)


def test_two_that_stay_with_their_results_end_the_run() -> None:
    with pytest.raises(Undecided, match="rank . and rank . compute virtual worker . in step 0 differently"):
        together(2, lambda world: train(world, {1: lambda computed: True}))


def settled(processes: int, liars: int) -> list[Tried]:
    """A step in which so many of those that compute the same are wrong, each in its own way."""

    def audited(world: World) -> Tried:
        def compute(step: int, workers: Sequence[int]) -> Tensor:
            return torch.tensor([(1 + world.rank) * (world.rank in wrong)])

        name, gpu = f"rank {5 + world.rank} on h{world.rank}", f"GPU 0 (0000:0{world.rank}:00.0)"
        audit = Audit(1.0, 3, 6, 1, world, lambda step: 24, compute, name, lambda: gpu)
        drawn = audit.of(0)
        assert drawn
        wrong = [drawn.owner, *({*range(processes)} - {drawn.owner})][:liars]
        if world.rank in (drawn.owner, drawn.auditor):
            audit.note(0, compute(0, drawn.workers))
        with pytest.raises(Disagreement):
            audit.compare(0)
        return audit.settle()

    return together(processes, audited)


def test_who_is_wrong_is_told_with_its_host_and_gpu() -> None:
    for tried in settled(3, 1):
        assert tried.gpus == [f"GPU 0 (0000:0{tried.owner}:00.0)"]
    for processes in (2, 3):
        with pytest.raises(Undecided) as undecided:
            settled(processes, processes)
        for rank in range(processes):
            assert f"rank {5 + rank} on h{rank} (GPU 0 (0000:0{rank}:00.0))" in str(undecided.value)


def test_a_third_process_is_on_a_third_host_where_there_is_one() -> None:
    audit = Audit(0.0, 3, 6, 1, Solo(), lambda step: 24, lambda *_: torch.zeros(1))
    for hosts, third in (("00224", 4), ("00222", 1), ("00", None)):
        audit._hosts, audit._world.size = list(map(int, hosts)), len(hosts)
        assert audit._third(Draw([0], 0, len(hosts) // 2)) == third


class Files(ArrayImages):
    """PNG files in memory, some of them cut short."""

    encoded = True

    def read(self, ids: np.ndarray) -> list[np.ndarray]:
        files = []
        for number, pixels in zip(ids.tolist(), super().read(ids), strict=True):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            files.append(np.frombuffer(file.getvalue(), np.uint8)[: -40 if number % 50 == 0 else None])
        return files


def test_a_broken_image_is_told_once() -> None:
    """By the process that hosts its worker, and not by who computes that again."""
    whole = small_data().train
    files = Files(np.stack(whole.read(np.arange(150))), whole.labels, whole.classes, "files")
    skip = {"on_bad_image": "skip", "max_bad_images": 0.5, "loader": "torchvision"}
    told = []
    for audit in (0.0, 1.0):
        found = together(
            2,
            lambda world, audit=audit: train(world, {}, files, audit=audit, **skip),  # type: ignore[misc]
        )
        told.append(found[0][1].bad)
    assert told[0] == told[1]
    assert {record["image"] for record in told[0]} == {0, 50, 100}


def test_only_in_the_reproducible_mode() -> None:
    with pytest.raises(UserError, match="add it"):
        make_recipe({"audit": 0.5})
    assert (
        make_recipe({"audit": 0.5, "reproducible": True}).mathematics()
        == make_recipe({"reproducible": True}).mathematics()
    )
