"""The chain that a run records: the same on any number of processes, through stops, kills and minibatches left out."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_runs import assert_agrees
from together import together

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.exact.chain import ChainReport, examine_chain
from hvd_lb.recipe import Recipe
from hvd_lb.replay.again import Again
from hvd_lb.replay.beginning import beginning
from hvd_lb.replay.recorded import open_run
from hvd_lb.report.metrics import RunObserver, SilentObserver, read_metrics, truncate_metrics
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.training.checkpoint import CheckpointStore
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

pytestmark = pytest.mark.slow


def small_data() -> Dataset:
    rng = np.random.default_rng(0)

    def split(count: int) -> ArrayImages:
        labels = rng.integers(0, 5, count)
        pixels = rng.integers(0, 120, (count, 8, 8, 3)) + 25 * labels[:, None, None, None]
        return ArrayImages(pixels.astype(np.uint8), labels, list("abcde"), "noise")

    return Dataset("small", split(150), split(37))


def small_recipe(**changes: Any) -> Recipe:
    base = {
        "model": "resnet8", "image_size": 8, "gpus": 4, "per_gpu_batch": 8, "eval_crop": 1.0, "warmup": "none",
        "eval_every": "never", "checkpoint_every": "never", "together": 1,
    }  # fmt: skip
    return Recipe(**{**base, **changes})


END = 10  # two epochs of 150 images in steps of 32, the last one short


@pytest.fixture(autouse=True, scope="module")
def one_initialisation() -> Iterator[None]:
    """Threads share torch's random numbers."""
    fresh = build_model("resnet8", 5, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))
        yield


def run(world: World, folder: Path, stop_after: int = END, bad: int = -1, **changes: Any) -> None:
    """A run from where the folder's newest checkpoint is, as a rank makes it, to its end or a stop."""
    recipe = small_recipe(
        reproducible=True, epochs=2, last_batch="keep", log_every=1, learning_rate=0.02,
        eval_every="3steps", checkpoint_every="4steps", digest_every="2steps", **changes,
    )  # fmt: skip
    directory, data = RunDirectory(folder), small_data()
    store = CheckpointStore(directory.checkpoints)
    checkpoint, _ = store.newest_intact()
    step = checkpoint.step if checkpoint else 0
    observer: RunObserver | SilentObserver = SilentObserver()
    if world.rank == 0:
        directory.logs.mkdir(parents=True, exist_ok=True)
        directory.recipe.write_text(recipe.to_yaml())
        due = checkpoint is not None and checkpoint.saved.evaluation_due
        truncate_metrics(directory.metrics, step, evaluation_due=due)
        plan = recipe.sample_plan(len(data.train))
        observer = RunObserver(directory, step, begin=beginning(recipe, plan, data.fingerprint(), checkpoint))
    trainer = Trainer(
        recipe, data, world, device=torch.device("cpu"), threads=1, observer=observer, store=store,
        checkpoint=checkpoint,
        stop_requested=lambda: signal.SIGTERM * (trainer.model.training and trainer.step + 1 == stop_after),
    )  # fmt: skip
    plain = trainer.forward.loss

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return plain(logits, labels) * (math.nan if trainer.step == bad else 1.0)

    trainer.forward.loss = loss
    trainer.fit()
    observer.close()


def digest_lines(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"digest"' in line]


def chain(folder: Path) -> ChainReport:
    return examine_chain(read_metrics(folder / "metrics.jsonl"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(Solo(), folder)
    return folder


def test_a_run_on_one_process(alone: Path) -> None:
    report = chain(alone)
    assert report.begin is not None
    assert report.begin["plan"]["steps_per_epoch"] == END / 2
    assert [record["step"] for record in report.digests] == [1, 3, 5, 7, 9]
    assert (report.broken, report.unsealed) == ([], 0)
    for name in ("weights", "velocities", "statistics"):
        assert len({record[name] for record in report.digests}) == 5


def test_three_processes_tell_the_same_bytes(alone: Path, tmp_path: Path) -> None:
    together(3, lambda world: run(world, tmp_path))
    assert digest_lines(tmp_path) == digest_lines(alone)
    assert chain(tmp_path).last == chain(alone).last


@pytest.mark.long
@pytest.mark.parametrize("killed", [False, True])
def test_so_does_a_run_that_was_stopped_or_killed_and_goes_on(
    killed: bool, alone: Path, tmp_path: Path
) -> None:
    """Killed: the newest checkpoint is of step 4, and steps that were told are told again."""
    run(Solo(), tmp_path, stop_after=7)
    assert digest_lines(tmp_path) == digest_lines(alone)[:3]
    if killed:
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000007")
    together(2, lambda world: run(world, tmp_path))
    assert digest_lines(tmp_path) == digest_lines(alone)
    assert chain(tmp_path).broken == []
    assert_agrees(tmp_path)
    assert chain(tmp_path).last == chain(alone).last


@pytest.mark.long
def test_a_minibatch_that_is_left_out_is_in_the_chain(alone: Path, tmp_path: Path) -> None:
    run(Solo(), tmp_path, on_nan="rollback", bad=6)
    report = chain(tmp_path)
    assert (report.broken, report.unsealed) == ([], 0)
    assert_agrees(tmp_path)
    assert [record.get("left_out") for record in report.digests] == [None, None, None, [6], [6]]
    assert digest_lines(tmp_path)[:2] == digest_lines(alone)[:2]
    assert json.loads(digest_lines(tmp_path)[-1])["chain"] != json.loads(digest_lines(alone)[-1])["chain"]


def test_a_run_is_taken_again_with_minibatches_left_out_and_statistics_recomputed(tmp_path: Path) -> None:
    """Also those before an evaluation that a stop came before: the last one here."""
    run(Solo(), tmp_path, on_nan="rollback", bad=6, recompute_bn=20)
    assert_agrees(tmp_path)
    recorded = open_run(tmp_path)
    assert sorted(recorded.of_kind("eval")) == [2, 5, 8]
    again = Again(recorded, small_data(), torch.device("cpu"), None)
    again.take(END)
    compared = again.compared
    assert (compared.first, compared.records, compared.same_digests) == (None, END - 1 + 3, 5)


def test_without_digests_there_is_no_chain(tmp_path: Path) -> None:
    recipe, data = small_recipe(digest_every="never", steps=2), small_data()
    (tmp_path / "logs").mkdir()
    observer = RunObserver(RunDirectory(tmp_path), 0)
    Trainer(recipe, data, Solo(), device=torch.device("cpu"), threads=1, observer=observer).fit()
    observer.close()
    assert {record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")} <= {
        "train",
        "eval",
        "noise",
    }


def test_in_float_mode_weights_and_velocities_alone(tmp_path: Path) -> None:
    """The sums of statistics would round if they were formed for a digest."""
    recipe, data = small_recipe(digest_every="2steps", steps=2), small_data()
    (tmp_path / "logs").mkdir()
    observer = RunObserver(RunDirectory(tmp_path), 0)
    Trainer(recipe, data, Solo(), device=torch.device("cpu"), threads=1, observer=observer).fit()
    observer.close()
    (record,) = chain(tmp_path).digests
    assert record.keys() == {"kind", "epoch", "step", "weights", "velocities", "chain"}
