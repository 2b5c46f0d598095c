"""Trackers are told everything once and in order, also over resumes, and what they do not take ends nothing."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvd_lb.errors import UserError
from hvd_lb.recipe import make_recipe
from hvd_lb.report.metrics import JsonLines
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.track import tracking as tracking_module
from hvd_lb.track.target import TrackTarget, track_targets
from hvd_lb.track.tensorboard import TensorBoardTracker
from hvd_lb.track.tracker import Point, numbers_of
from hvd_lb.track.tracking import Tracking

RECIPE = make_recipe({"data": "digits", "model": "resnet8", "description": "x"})
FACTS = {"command": ["hvd-lb", "train"], "processes": 2}


def train(step: int) -> dict[str, Any]:
    rest = {"lr": 0.5, "loss": 2.0 + step, "images_per_second": 10.0, "data_wait": 0.25}
    return {"kind": "train", "epoch": 0, "step": step, **rest}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "a-run")
    run.logs.mkdir(parents=True)
    return run


def write(run: RunDirectory, *records: dict[str, Any]) -> None:
    lines = JsonLines(run.metrics)
    lines.add(*records)
    lines.write()


def begin(run: RunDirectory, target: str, first_step: int = 0, **changes: Any) -> Tracking:
    recipe = RECIPE.model_copy(update=changes)
    return Tracking([TrackTarget.parse(target)], run, recipe, FACTS, first_step)


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "a-run"), {"scalars": 0, "tensors": 0}).Reload()


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(folder).Scalars("train/loss")]


def text(folder: Path, name: str) -> str:
    """The newest."""
    told: bytes = board(folder).Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0]
    return told.decode()


@pytest.mark.parametrize(
    ("given", "kind", "where"),
    [
        ("mlflow", "mlflow", None),
        ("mlflow:http://host:5000", "mlflow", "http://host:5000"),
        ("mlflow:sqlite:///a.db", "mlflow", "sqlite:///a.db"),
        ("wandb:team/cats", "wandb", "team/cats"),
        ("tensorboard:/a:b", "tensorboard", "/a:b"),
    ],
)
def test_what_track_takes(given: str, kind: str, where: str | None) -> None:
    target = TrackTarget.parse(given)
    assert (target.kind, target.where) == (kind, where)
    assert str(target) == given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["wandbb"], "did you mean 'wandb'"),
        (["mlflow:"], "expected mlflow[:URI]"),
        ([""], "expected mlflow[:URI]"),
        (["mlflow:https://me:secret@host"], "MLFLOW_TRACKING_PASSWORD"),
        (["wandb", "mlflow", "wandb"], "--track wandb is given twice"),
    ],
)
def test_what_track_refuses(given: Sequence[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        track_targets(given)
    assert said in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("command", [("train",), ("simulate", "--run")])
def test_a_missing_package_is_told_before_anything_is_written(
    command: tuple[str, ...], hvd_lb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hvd_lb.track.target.find_spec", lambda name: None)
    said = hvd_lb(*command, "--data", "digits", "--device", "cpu", "--track", "mlflow")
    assert said.status == 2
    assert (
        said.err == "hvd-lb: error: --track mlflow needs the package mlflow: pip install 'hvd-lb[mlflow]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_numbers_have_units() -> None:
    evaluation = {"kind": "eval", "epoch": 1, "step": 9, "top1_error": 25.0, "loss": None, "images": 100}
    assert numbers_of(evaluation) == {"eval/top1_error_percent": 25.0, "eval/images": 100.0}
    averaged = {"kind": "eval", "step": 9, "ema_top1_error": 25.0, "ema_top5_error": 1.0, "ema_loss": 2.0}
    assert {*numbers_of(averaged)} == {
        *("eval/ema_top1_error_percent", "eval/ema_top5_error_percent", "eval/ema_loss")
    }
    ranks = {
        "kind": "ranks",
        "step": 9,
        "data": [1.0],
        "median": 2.0,
        "slowest": 1,
        "host": "h",
        "slower": 1.5,
    }
    assert numbers_of(ranks) == {"ranks/median_seconds": 2.0, "ranks/slowest_of_median": 1.5}
    training = {"kind": "train", "step": 9, "lr": 0.1, "gradient_norm": 3.0, "peak_memory_gb": 1.5}
    assert numbers_of(training) == {
        "train/learning_rate": 0.1, "train/gradient_norm": 3.0, "train/peak_memory_gb": 1.5,
    }  # fmt: skip
    assert numbers_of({"kind": "digest", "step": 9, "weights": 3}) == {}


def test_a_tracked_run_goes_on_and_hears_no_step_twice(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "boards"
    tracking = begin(run, f"tensorboard:{folder}")
    write(run, *map(train, range(6)), {"kind": "warning", "step": 5, "message": "rank 1 is slow"})
    assert tracking.update() == []
    [note] = tracking.close(1)
    assert note.startswith("trackers get no model card")  # there is no checkpoint
    assert "step 5: warning: rank 1 is slow" in text(folder, "events.txt")
    assert "model: resnet8" in text(folder, "recipe.yaml")

    # Killed: the next start takes steps from 3 on again.
    run.metrics.write_bytes(b"".join(run.metrics.read_bytes().splitlines(True)[:3]))
    tracking = begin(run, f"tensorboard:{folder}", first_step=3)
    write(run, *map(train, range(3, 8)))
    tracking.close(0)
    told = losses(folder)
    assert sorted(set(told)) == [(step, 2.0 + step) for step in range(8)]
    assert len(told) == 9  # what was told last may not have been all of its step
    assert json.loads(run.tracking.read_text())[f"tensorboard:{folder}"]["told"] == 7


def test_steps_of_a_rollback_are_told_again(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "boards"
    tracking = begin(run, f"tensorboard:{folder}")
    write(
        run, *map(train, range(4)), {"kind": "rollback", "epoch": 0, "step": 3, "to": 2}, train(2), train(3)
    )
    tracking.close(130)
    assert [step for step, _ in losses(folder)] == [0, 1, 2, 3, 2, 3]


def test_another_recipe_in_the_directory_is_another_tracked_run(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "boards"
    begin(run, f"tensorboard:{folder}").close(1)
    write(run, *map(train, range(3)))
    begin(run, f"tensorboard:{folder}").close(1)
    begin(run, f"tensorboard:{folder}", momentum=0.5).close(0)
    assert [step for step, _ in losses(folder)] == [0, 1, 2, 0, 1, 2]


def test_a_tracker_that_fails_is_told_of_once_and_tried_again(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_module, "_RETRY_SECONDS", 0.02)
    folder = tmp_path / "boards"
    folder.write_text("in the way")
    tracking = begin(run, f"tensorboard:{folder}")
    write(run, train(0))
    notes: list[str] = []
    until = time.monotonic() + 30
    while not notes and time.monotonic() < until:
        notes += tracking.update()
    [warning] = notes
    assert warning.startswith(f"warning: tensorboard:{folder}: ")
    assert warning.endswith("training goes on, and it is tried again")
    folder.unlink()
    write(run, train(1))
    [card] = tracking.close(1)
    assert card.startswith("trackers get no model card")
    assert [step for step, _ in losses(folder)] == [0, 1]


def test_what_was_not_told_until_the_end_is_counted(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "boards"
    folder.write_text("in the way")
    tracking = begin(run, f"tensorboard:{folder}")
    write(run, train(0), train(1))
    notes = tracking.close(1)
    assert sum(note.startswith("warning: ") for note in notes) == 1
    # The start, the recipe, two steps, what happened, and the end.
    assert notes[-1] == f"tensorboard:{folder}: 6 messages could not be told there"


def test_a_slow_tracker_is_told_at_once_what_has_come_together(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it keeps up: in order, with what is said between."""
    all_are_there, calls, numbers = threading.Event(), list[int](), TensorBoardTracker.numbers

    def slow(tracker: TensorBoardTracker, points: Sequence[Point]) -> None:
        assert all_are_there.wait(60)
        calls.append(len(points))
        numbers(tracker, points)

    monkeypatch.setattr(TensorBoardTracker, "numbers", slow)
    tracking = begin(run, f"tensorboard:{tmp_path}")
    for step in range(500):
        write(run, train(step))
        tracking.update()
    all_are_there.set()
    assert not [note for note in tracking.close(0) if "could not be told" in note]
    assert losses(tmp_path) == [(step, 2.0 + step) for step in range(500)]
    assert sum(calls) == 500
    assert len(calls) <= 5
