"""Nothing trained is lost: checkpoints before evaluations, numbers that are none, disks that are full or slow."""

from __future__ import annotations

import errno
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Records, make_trainer, run_steps, small_recipe

from hvd_lb.errors import UserError
from hvd_lb.training.checkpoint import BackgroundWriter, CheckpointStore, Snapshot, open_checkpoint
from hvd_lb.training.evaluation import Evaluation, Evaluator
from hvd_lb.training.trainer import Diverged, Trainer

pytestmark = pytest.mark.slow  # most are whole runs of a second or two

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
WEIGHTS = {"weight": torch.ones(3)}


def records(*trainers: Trainer) -> Records:
    """What the observers of these parts of a run were told."""
    all_of = Records()
    for trainer in trainers:
        for name, told in vars(trainer.observer).items():
            getattr(all_of, name).extend(told)
    return all_of


def assert_same_end(a: Trainer, b: Trainer, *files: str) -> None:
    assert a.store is not None
    assert b.store is not None
    for name in files or FILES:
        assert (a.store.folder / "last" / name).read_bytes() == (b.store.folder / "last" / name).read_bytes()


def resumed(trainer: Trainer) -> Trainer:
    assert trainer.store is not None
    found, damaged = trainer.store.newest_intact()
    assert not damaged
    return make_trainer(trainer.recipe, store=trainer.store, checkpoint=found)


@pytest.fixture
def whole(tmp_path: Path) -> Trainer:
    """A run of 3 epochs of 4 steps that nobody has disturbed."""
    trainer = make_trainer(periodic(), store=CheckpointStore(tmp_path / "whole"))
    trainer.fit()
    return trainer


def periodic(**changes: Any) -> Any:
    return small_recipe(
        precision="fp32", eval_every="1epoch", checkpoint_every="1epoch", log_every=3, **changes
    )


def test_a_kill_in_the_evaluation_loses_nothing(
    whole: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = make_trainer(periodic(), store=CheckpointStore(tmp_path / "run"))
    evaluate = Evaluator.__call__

    def killing(self: Evaluator, *arguments: Any) -> Evaluation:
        if killed.step == 8:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    monkeypatch.setattr(Evaluator, "__call__", killing)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    monkeypatch.undo()
    goes_on = resumed(killed)
    assert (goes_on.step, goes_on.state.evaluation_due) == (8, True)
    goes_on.fit()
    assert records(killed, goes_on).evaluations == records(whole).evaluations
    assert_same_end(whole, goes_on)
    assert (
        open_checkpoint(tmp_path / "run" / "best").step == open_checkpoint(tmp_path / "whole" / "best").step
    )


@pytest.mark.parametrize("checkpoint_every", ["1epoch", "10min"])
@pytest.mark.parametrize("at_step", [4, 12])
def test_a_stop_is_heard_in_the_evaluation(checkpoint_every: str, at_step: int, tmp_path: Path) -> None:
    recipe = periodic().model_copy(update={"checkpoint_every": checkpoint_every})
    asked: list[int] = []

    def stop_requested() -> int:
        asked.append(run.step)
        return 15 if asked.count(at_step) > (2 if at_step < 12 else 1) else 0

    run = make_trainer(recipe, store=CheckpointStore(tmp_path), stop_requested=stop_requested)
    run.fit()
    assert (run.step, run.stopped_by, run.state.evaluation_due) == (at_step, 15, True)
    assert [of["step"] for of in records(run).evaluations] == [step - 1 for step in (4, 8) if step < at_step]
    goes_on = resumed(run)
    goes_on.fit()
    undisturbed = make_trainer(recipe, store=CheckpointStore(tmp_path / "whole"))
    undisturbed.fit()
    assert records(run, goes_on).evaluations == records(undisturbed).evaluations
    assert_same_end(undisturbed, goes_on, *FILES[:2])


@pytest.mark.parametrize("checkpoint_every", ["1epoch", "10min", "3steps"])
@pytest.mark.parametrize(
    ("errors", "best"), [((50.0, 40.0, 60.0), 8), ((40.0, 40.0, 40.0), 4), ((30.0, 50.0, 20.0), 12)]
)
def test_the_best_is_kept_whatever_the_period(
    errors: tuple[float, ...],
    best: int,
    checkpoint_every: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ties keep the earlier one; resumes in between change nothing."""
    recipe = periodic(keep_checkpoints=1).model_copy(update={"checkpoint_every": checkpoint_every})
    given = dict(zip((4, 8, 12), errors, strict=True))
    run = make_trainer(recipe, store=CheckpointStore(tmp_path, keep=1))
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: Evaluation(given[run.step], 0.0, 1.0, 37))
    asked: list[int] = []
    run.stop_requested = lambda: asked.append(0) or 15 * (len(asked) == 9)  # type: ignore[func-returns-value]
    run.fit()
    run = resumed(run)
    run.fit()
    found = open_checkpoint(tmp_path / "best")
    assert (found.step, found.saved.best_error) == (best, min(errors))
    assert open_checkpoint(tmp_path / "last").step == 12
    assert len(list(tmp_path.glob("step-*"))) == (1 if best == 12 else 2)


def test_a_checkpoint_tells_of_its_evaluation(whole: Trainer) -> None:
    assert whole.store is not None
    last = records(whole).evaluations[-1]
    saved = open_checkpoint(whole.store.folder / "last").saved
    assert saved.evaluation == {name: last[name] for name in ("top1_error", "top5_error", "loss", "images")}
    assert not saved.evaluation_due


def spoil(trainer: Trainer, *steps: int, by: float = math.nan) -> None:
    """The loss of one virtual worker is multiplied so in these steps."""
    plain = trainer.forward.loss

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return plain(logits, labels) * (by if trainer.step in steps else 1.0)

    trainer.forward.loss = loss


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_what_is_no_number_is_never_saved(by: float, reproducible: bool, tmp_path: Path) -> None:
    recipe = small_recipe(log_every=4, checkpoint_every="1steps", reproducible=reproducible)
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path))
    spoil(trainer, 2, by=by)
    with pytest.raises(Diverged, match=r"after step 2 \(epoch 0, .*--on-nan rollback"):
        trainer.fit()
    found = open_checkpoint(tmp_path / "last")
    assert found.step in (1, 2)  # a writer that is still busy with 1 leaves 2 out
    for tensors in (found.model(), found.optimizer()):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("bad_steps", [(5,), (0,), (4, 9), (10, 11)])
def test_a_minibatch_is_left_out(bad_steps: tuple[int, ...], tmp_path: Path) -> None:
    """As if its step were not taken: no update, and everything else of the run as it was."""
    recipe = periodic(on_nan="rollback")
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path / "run"))
    spoil(trainer, *bad_steps)
    trainer.fit()
    expected = make_trainer(recipe, store=CheckpointStore(tmp_path / "expected"))
    expected.state.left_out = set(bad_steps)
    expected.fit()
    assert trainer.step == trainer.end
    assert_same_end(trainer, expected)
    told = [record for record in records(trainer).rollbacks if record["left_out"]]
    assert [record["step"] for record in told] == list(bad_steps)
    plan, recipe = trainer.plan, trainer.recipe
    for record in told:
        epoch, step = divmod(record["step"], plan.steps_per_epoch)
        assert record["images"] == [
            int(i) for worker in range(recipe.gpus) for i in plan.image_ids(epoch, step, worker)
        ]
        assert record["to"] <= record["step"]
    json.dumps(records(trainer).rollbacks)


def test_a_step_that_is_left_out_counts_for_no_average() -> None:
    """Neither for that of the losses nor for that of the weights."""
    trainer = make_trainer(periodic(on_nan="rollback", ema=0.5))
    trainer.state.left_out = {2}
    run_steps(trainer, 2)
    before = [average.clone() for average in trainer.state.average.tensors().values()]  # type: ignore[union-attr]
    run_steps(trainer, 1)
    assert trainer.step == 3
    assert trainer.state.loss_images == 2 * trainer.recipe.global_batch
    assert all(map(torch.equal, before, trainer.state.average.tensors().values()))  # type: ignore[union-attr]


def test_a_velocity_that_is_no_number_is_found() -> None:
    """Also where the weights are some, as at a learning rate of 0."""
    trainer = make_trainer(periodic())
    run_steps(trainer, 1)
    for velocity, finite in ((1.0, True), (math.inf, False)):
        next(iter(trainer.state.optimizer.state.values()))["velocity"].view(-1)[0] = velocity
        assert trainer.state.finite(trainer.state.losses) is finite


def test_who_goes_back_waits_for_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointStore.write
    monkeypatch.setattr(CheckpointStore, "write", lambda *arguments: time.sleep(0.3) or write(*arguments))
    trainer = make_trainer(
        periodic(on_nan="rollback", steps=1, max_rollbacks=1), store=CheckpointStore(tmp_path)
    )
    spoil(trainer, 0)
    trainer.fit()
    assert trainer.state.left_out == {0}


def test_minibatches_left_out_stay_left_out_after_a_resume(tmp_path: Path) -> None:
    recipe = periodic(on_nan="rollback")
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path))
    spoil(trainer, 5)
    trainer.fit()
    assert resumed(trainer).state.left_out == {5}


def test_not_more_minibatches_are_left_out_than_allowed(tmp_path: Path) -> None:
    trainer = make_trainer(periodic(on_nan="rollback", max_rollbacks=2), store=CheckpointStore(tmp_path))
    spoil(trainer, 1, 2, 7)
    with pytest.raises(Diverged, match="2 minibatches were left out before"):
        trainer.fit()
    assert trainer.state.left_out == {1, 2}


def test_faults_that_do_not_come_again_count_too(tmp_path: Path) -> None:
    """A machine that computes wrongly now and then."""
    trainer = make_trainer(periodic(on_nan="rollback", max_rollbacks=2), store=CheckpointStore(tmp_path))
    plain, still = trainer.forward.loss, {1, 5, 9}

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wrong = trainer.step in still
        still.discard(trainer.step)
        return plain(logits, labels) * (math.nan if wrong else 1.0)

    trainer.forward.loss = loss
    with pytest.raises(Diverged, match="0 minibatches were left out before, 2 times it did not come again"):
        trainer.fit()
    assert not still
    assert len(records(trainer).rollbacks) == 2


def test_a_damaged_checkpoint_is_set_aside_when_the_run_goes_back(tmp_path: Path) -> None:
    trainer = make_trainer(periodic(on_nan="rollback"), store=CheckpointStore(tmp_path))
    spoil(trainer, 9)
    roll_back, damaged = trainer._roll_back, []

    def after_damage(diverged: Diverged) -> None:
        if not damaged:
            damaged.append(CheckpointStore(tmp_path).newest_first()[0])
            (damaged[0] / "model.safetensors").write_bytes(b"")
        roll_back(diverged)

    trainer._roll_back = after_damage  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.state.left_out == {9}
    assert (tmp_path / f"damaged-{damaged[0].name}").is_dir()
    (warning,) = records(trainer).warnings
    assert "it is set aside" in warning
    assert records(trainer).rollbacks[0]["to"] < int(damaged[0].name.removeprefix("step-"))


def test_statistics_that_are_no_numbers_name_their_step(tmp_path: Path) -> None:
    """A variance may overflow where loss and weights do not."""
    trainer = make_trainer(periodic(on_nan="rollback"), store=CheckpointStore(tmp_path))
    update = trainer.state.statistics.step

    def overflowing(active_workers: int) -> None:
        update(active_workers)
        if trainer.step == 5:
            trainer.state.statistics._share[1][0] = math.inf

    trainer.state.statistics.step = overflowing  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.state.left_out == {5}
    assert len(records(trainer).rollbacks) == 2


def test_what_stays_no_number_without_its_minibatch_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(periodic(on_nan="rollback"), store=CheckpointStore(tmp_path))
    plain = Trainer.after_step

    def keep(self: Trainer, *arguments: Any) -> None:
        if self.step == 6:
            raise Diverged("what is recomputed is no number")
        plain(self, *arguments)

    monkeypatch.setattr(Trainer, "after_step", keep)
    with pytest.raises(Diverged, match="what is recomputed"):
        trainer.fit()
    assert len(records(trainer).rollbacks) == 2


def test_a_run_from_another_folders_checkpoint_has_one_to_go_back_to(tmp_path: Path) -> None:
    begun = make_trainer(periodic(on_nan="rollback", steps=4), store=CheckpointStore(tmp_path / "a"))
    begun.fit()
    trainer = make_trainer(
        periodic(on_nan="rollback"),
        store=CheckpointStore(tmp_path / "b"),
        checkpoint=open_checkpoint(tmp_path / "a" / "last"),
    )
    spoil(trainer, 5)
    trainer.fit()
    assert trainer.state.left_out == {5}


def test_an_evaluation_that_was_due_elsewhere_is_noted_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the best is that of this folder."""
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: Evaluation(40.0, 0.0, 1.0, 37))
    begun = make_trainer(periodic(steps=12), store=CheckpointStore(tmp_path / "a"))
    begun.stop_requested = lambda: 15 * (begun.step == 11)
    begun.fit()
    due = open_checkpoint(tmp_path / "a" / "last")
    assert (due.step, due.saved.evaluation_due, due.saved.best_error) == (12, True, 40)
    make_trainer(periodic(), store=CheckpointStore(tmp_path / "b"), checkpoint=due).fit()
    for name in ("last", "best"):
        found = open_checkpoint(tmp_path / "b" / name)
        assert (found.step, found.saved.evaluation_due) == (12, False)


@pytest.mark.parametrize("checkpoint_every", ["1epoch", "10min"])
@pytest.mark.parametrize(
    ("errors", "lost", "best"),
    [((10, 50, 40), [1], 12), ((50, 10, 40), [2], 12), ((20, 10, 40), [2], 4), ((10, 50, 60), [1], 8)],
)
def test_where_the_best_was_lost_the_best_that_is_there_counts(
    errors: tuple[float, ...],
    lost: list[int],
    best: int,
    checkpoint_every: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(
        periodic().model_copy(update={"checkpoint_every": checkpoint_every}), store=CheckpointStore(tmp_path)
    )
    given = dict(zip((4, 8, 12), errors, strict=True))
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: Evaluation(given[trainer.step], 0.0, 1.0, 37))
    write = CheckpointStore.write

    def full(self: CheckpointStore, snapshot: Snapshot) -> Path:
        if snapshot.step // 4 in lost:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, snapshot)

    monkeypatch.setattr(CheckpointStore, "write", full)
    trainer.fit()
    assert open_checkpoint(tmp_path / "best").step == best


def fail_on(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Writing the tensors of the n-th file fails for want of room."""
    from hvd_lb.training import checkpoint

    write, count = checkpoint.save_tensors, [0]

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        count[0] += 1
        if fails(count[0]):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, file, metadata)

    monkeypatch.setattr(checkpoint, "save_tensors", full)


def test_a_full_disk_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(periodic(), store=CheckpointStore(tmp_path))
    fail_on(monkeypatch, lambda number: number == 4)
    trainer.fit()
    assert trainer.step == trainer.end
    (warning,) = records(trainer).warnings
    assert warning == "the checkpoint of step 8 cannot be written: No space left on device; training goes on"
    assert sorted(path.name for path in tmp_path.iterdir() if "step" in path.name) == [
        "step-00000004", "step-00000012"
    ]  # fmt: skip


def test_a_disk_that_is_full_to_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(periodic(), store=CheckpointStore(tmp_path))
    fail_on(monkeypatch, lambda number: number > 2)
    with pytest.raises(UserError, match="No space left on device; newest there: step-00000004.*: make room"):
        trainer.fit()
    assert trainer.step == trainer.end
    assert open_checkpoint(tmp_path / "last").step == 4
    assert not list(tmp_path.glob(".*step*"))


def test_old_checkpoints_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, WEIGHTS, WEIGHTS, {})
    fail_on(monkeypatch, lambda _: (tmp_path / "step-00000001").exists())
    store.save(3, WEIGHTS, WEIGHTS, {})
    assert [path.name for path in store.newest_first()] == ["step-00000003", "step-00000002"]
    fail_on(monkeypatch, lambda _: True)
    with pytest.raises(OSError, match="No space left"):
        store.save(4, WEIGHTS, WEIGHTS, {})
    assert open_checkpoint(tmp_path / "last").step == 3


def test_a_slow_disk_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, goes_on, warnings = CheckpointStore(tmp_path), threading.Event(), []
    write = CheckpointStore.write
    monkeypatch.setattr(CheckpointStore, "write", lambda *arguments: goes_on.wait() and write(*arguments))
    writer = BackgroundWriter(store, warnings.append)
    assert writer.save(1, WEIGHTS, WEIGHTS, {}, wait=False)
    assert not writer.save(2, WEIGHTS, WEIGHTS, {}, wait=False)
    assert warnings == ["the checkpoint before is still being written, so that of step 2 is left out"]
    goes_on.set()
    assert writer.save(3, WEIGHTS, WEIGHTS, {}, wait=True)
    writer.close()
    assert [path.name for path in store.newest_first()] == ["step-00000003", "step-00000001"]


def test_on_a_slow_disk_only_what_nothing_depends_on_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is evaluated may be the best, and the last step and that of a stop are the end."""
    waited: dict[int, bool] = {}
    save = BackgroundWriter.save

    def noted(self: BackgroundWriter, step: int, *arguments: Any, wait: bool, **named: Any) -> bool:
        waited[step] = wait
        return save(self, step, *arguments, wait=wait, **named)

    monkeypatch.setattr(BackgroundWriter, "save", noted)
    recipe = periodic().model_copy(update={"checkpoint_every": "1steps"})
    trainer = make_trainer(recipe, store=CheckpointStore(tmp_path))
    trainer.stop_requested = lambda: 15 * (trainer.step == 9)
    trainer.fit()
    assert {step for step, wait in waited.items() if wait} == {4, 8, 10}
    resumed(trainer).fit()
    assert {step for step, wait in waited.items() if wait} == {4, 8, 10, 12}
    assert len(waited) == 12


def test_an_evaluation_of_a_checkpoint_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, WEIGHTS, WEIGHTS, {})
    store.conclude(2, {"evaluation_due": False}, best=True)
    assert not (tmp_path / "best").exists()


def test_a_kill_between_announcement_and_note_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvd_lb.training import checkpoint

    store = CheckpointStore(tmp_path)
    store.save(1, WEIGHTS, WEIGHTS, {"evaluation_due": True})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write_state", killed)
    with pytest.raises(KeyboardInterrupt):
        store.conclude(1, {"evaluation_due": False}, best=True)
    monkeypatch.undo()
    assert open_checkpoint(tmp_path / "last").state["evaluation_due"]
    store.discard_after(1)
    store.conclude(1, {"evaluation_due": False}, best=True)
    assert not open_checkpoint(tmp_path / "best").state["evaluation_due"]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], format_number: int = 2) -> None:
    """A checkpoint as another version would have left it."""
    from hvd_lb.training import checkpoint

    state = json.loads((path / "state.json").read_text())
    del state["checksum"]
    change(state)
    state["format"] = format_number
    (path / "state.json").write_text(json.dumps({**state, "checksum": checkpoint._digest(state)}))


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    recipe = small_recipe(steps=2, log_every=4, reproducible=False)
    begun = make_trainer(recipe, store=CheckpointStore(tmp_path / "run"))
    begun.fit()
    longer = small_recipe(steps=4, log_every=4)
    expected = make_trainer(longer, checkpoint=open_checkpoint(tmp_path / "run" / "last"))
    loss = float(expected.state.losses.sum())

    def as_it_was(state: dict[str, Any]) -> None:
        for name in ("environment", "evaluated_at", "evaluation_due", "left_out", "bad_images"):
            del state[name]
        state["loss_sum"] = loss
        for name in ("reproducible", "recompute_bn", "val_fraction", "flip"):
            del state["recipe"][name]

    rewritten((tmp_path / "run" / "last").resolve(), as_it_was, format_number=1)
    old = open_checkpoint(tmp_path / "run" / "last")
    assert (old.evaluation, old.saved.evaluation is not None) == (None, True)  # of which weights is not told
    found = make_trainer(longer, checkpoint=old)
    assert found.step == 2
    assert float(found.state.losses.sum()) == loss
    for trainer in (expected, found):
        trainer.fit()
    assert records(found).training == [{**r, **speeds(found)} for r in records(expected).training]


def speeds(trainer: Trainer) -> dict[str, float]:
    (record,) = records(trainer).training
    return {name: record[name] for name in ("images_per_second", "data_wait", "peak_memory_gb")}
