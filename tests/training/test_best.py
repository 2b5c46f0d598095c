"""`best` leads to the checkpoint with the fewest errors of the whole run, however often that stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_trainer import make_trainer, small_recipe

from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint
from hvd_lb.training.evaluation import Evaluation, Evaluator
from hvd_lb.training.trainer import Trainer

EPOCH = 4


def run(
    errors: list[float],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int | None = None,
    keep: int = 1,
) -> Trainer:
    """Epochs whose evaluations give these errors, up to `steps`; goes on from the last checkpoint, if there is one."""

    def evaluate(self: Evaluator, *arguments: object) -> Evaluation:
        return Evaluation(errors[trainer.step // EPOCH - 1], 0.0, 1.0, 37)

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    last = folder / "last"
    recipe = small_recipe(
        epochs=len(errors), steps=steps, eval_every="1epoch", checkpoint_every="1epoch", precision="fp32"
    )
    trainer = make_trainer(
        recipe,
        store=CheckpointStore(folder, keep=keep),
        checkpoint=open_checkpoint(last) if last.exists() else None,
    )
    assert trainer.plan.steps_per_epoch == EPOCH
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("errors", "epoch"),
    [
        ([50, 40, 45], 2),
        ([50, 45, 40], 3),
        ([40, 45, 50], 1),
        ([40, 40, 40], 1),
        ([50, 40, 45, 40], 2),
        ([100, 100], 1),
        ([0, 0], 1),
    ],
)
def test_it_has_the_fewest_errors_and_of_equal_ones_is_the_first(
    errors: list[float], epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(errors, tmp_path, monkeypatch)
    assert open_checkpoint(tmp_path / "best").step == epoch * EPOCH
    assert open_checkpoint(tmp_path / "last").step == len(errors) * EPOCH
    assert trainer.state.best_error == min(errors)


@pytest.mark.parametrize(("fourth", "epoch"), [(41, 2), (40, 2), (39.9, 4)])
@pytest.mark.parametrize("stops", [(3,), (1, 2, 3)])
def test_a_run_that_stopped_keeps_its_best(
    stops: tuple[int, ...], fourth: float, epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the newest checkpoint, from which it goes on, is a worse one."""
    errors = [50, 40, 45, fourth]
    for stop in stops:
        run(errors, tmp_path, monkeypatch, steps=stop * EPOCH)
    trainer = run(errors, tmp_path, monkeypatch)
    assert open_checkpoint(tmp_path / "best").step == epoch * EPOCH
    assert open_checkpoint(tmp_path / "last").saved.best_error == trainer.state.best_error == min(errors)


def test_a_stop_within_an_epoch_with_as_many_errors_is_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end at --steps makes an evaluation, here with the errors of the epoch before."""
    errors = [50, 40, 45]
    run(errors, tmp_path, monkeypatch, steps=10)
    assert open_checkpoint(tmp_path / "last").step == 10
    assert open_checkpoint(tmp_path / "best").step == 8
    run(errors, tmp_path, monkeypatch)
    assert open_checkpoint(tmp_path / "best").step == 8


def test_what_was_evaluated_last_is_known_to_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop makes no evaluation: its checkpoint tells of the one before the resume."""
    run([50, 40, 45], tmp_path, monkeypatch, steps=EPOCH)
    saved = open_checkpoint(tmp_path / "last")
    evaluation = saved.saved.evaluation
    assert evaluation
    assert evaluation["top1_error"] == 50
    recipe = small_recipe(epochs=3, checkpoint_every="1epoch", precision="fp32")
    stopped = make_trainer(
        recipe,
        store=CheckpointStore(tmp_path),
        checkpoint=saved,
        stop_requested=lambda: int(stopped.step == 5),
    )
    stopped.fit()
    last = open_checkpoint(tmp_path / "last")
    assert (last.step, last.saved.evaluation, last.saved.best_error) == (6, evaluation, 50)
    assert (last.evaluation, saved.evaluation) == (None, evaluation)  # whose weights were evaluated
    assert open_checkpoint(tmp_path / "best").step == 4
