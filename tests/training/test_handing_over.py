"""Every process of an elastic run has the whole state after each step, and what another takes over is that."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_wishes import make_trainer, one_initialisation  # noqa: F401 - a fixture
from together import Together, together

from hvd_lb.errors import ExchangeError
from hvd_lb.training.checkpoint import Snapshot
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World


class Member:
    """Who wants to join or to leave, and after which step."""

    def __init__(self, join: int = -1, leave: int = -1):
        self._join, self._leave, self.steps = join, leave, 0

    def wishes(self) -> tuple[bool, bool]:
        return self.steps == self._join, self.steps == self._leave

    def step_taken(self, step: int) -> None:
        self.steps = step


def member_trainer(world: World, **arguments: Any) -> Trainer:
    trainer = make_trainer(world, **{"steps": 6, "log_every": 4, "membership": Member(), **arguments})
    trainer.model.train()
    return trainer


def take(trainer: Trainer, steps: int) -> None:
    with trainer.kernels(), trainer.batches() as batches:
        for _ in range(steps):
            trainer.train_step(batches)
            trainer.unfinished = False


def assert_equal(one: Snapshot, other: Snapshot, relative: float = 0.0) -> None:
    assert (one.step, one.model.keys(), one.optimizer.keys()) == (
        other.step, other.model.keys(), other.optimizer.keys(),
    )  # fmt: skip
    for name in one.model:
        torch.testing.assert_close(one.model[name], other.model[name], rtol=relative, atol=relative)
    for name in one.optimizer:
        torch.testing.assert_close(one.optimizer[name], other.optimizer[name], rtol=relative, atol=relative)
    if not relative:
        assert one.state == other.state


@pytest.mark.parametrize("reproducible", [False, True])
def test_all_have_the_same_and_it_is_that_of_one_process(reproducible: bool) -> None:
    """Losses since the last record and batch norm's statistics are in it."""

    def run(world: World) -> Snapshot:
        trainer = member_trainer(world, reproducible=reproducible, ema=0.9)
        take(trainer, 3)
        return trainer.hand_over()

    (alone,), three = together(1, run), together(3, run)
    for snapshot in three:
        assert_equal(three[0], snapshot)
        assert_equal(alone, Snapshot.from_bytes(snapshot.to_bytes()), 0.0 if reproducible else 1e-5)
    assert alone.state["loss_images"] > 0
    assert alone.optimizer["losses"].all()


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("lost", ["hvd_lb.losses.step", "bucket.0", "bucket.0.largest", "hvd_lb.batch_norm"])
def test_a_step_that_others_do_not_finish_leaves_no_trace(
    reproducible: bool, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process does not get a sum of the step, the other those that are begun after it, or all of them."""

    def run(world: Together) -> tuple[Snapshot, Snapshot | None, bool]:
        before = member_trainer(world, reproducible=reproducible, ema=0.9)
        take(before, 2)
        two = before.hand_over()
        trainer = member_trainer(world, reproducible=reproducible, ema=0.9, carried=two)
        if world.rank:
            start = world._start

            def lose(tensor: torch.Tensor, name: str, combine: Any) -> Any:
                handle = start(tensor, name, combine)
                if name.endswith(lost):
                    handle.wait = fail  # type: ignore[method-assign]
                return handle

            world._start = lose  # type: ignore[method-assign]
        try:
            take(trainer, 1)
        except RuntimeError:
            world._meeting.give_up()
            return two, trainer.hand_over(), trainer.repeats
        return two, None, False

    def fail() -> Any:
        raise ExchangeError("another process was lost")

    first, second = together(2, run)
    if lost == "bucket.0":
        assert first[1] is None
    if lost.endswith("largest") and not reproducible:  # which is exchanged in the other mode only
        assert second[1] is None
        return
    for two, after, repeats in (first, second):
        if after:
            assert_equal(two, after)
            assert repeats
    assert second[1]


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_step_of_an_elastic_run_exchanges_the_losses_and_statistics_more(reproducible: bool) -> None:
    """k float64 numbers; two more integers ride along."""

    def exchanges(world: Together) -> tuple[Counter[str], int]:
        trainer = member_trainer(world, reproducible=reproducible)
        take(trainer, 1)
        before, sizes = world._times.copy(), Counter[str]()
        start = world._start

        def counted(tensor: torch.Tensor, name: str, combine: Any) -> Any:
            sizes[name] += tensor.nbytes
            return start(tensor, name, combine)

        world._start = counted  # type: ignore[method-assign]
        take(trainer, 1)
        assert sizes["hvd_lb.losses.step"] == 8 * trainer.recipe.gpus
        return world._times - before, 0

    names = {"hvd_lb.optimizer.bucket.0", "hvd_lb.batch_norm"}
    if reproducible:
        names |= {f"{name}.largest" for name in names}
    for counts, _ in together(3, exchanges):
        assert counts == dict.fromkeys({*names, "hvd_lb.losses.step"}, 1)


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize(("join", "leave"), [(3, -1), (-1, 3)])
def test_all_end_a_generation_after_the_same_step(lag: bool, join: int, leave: int) -> None:
    def run(world: World) -> tuple[int, bool, int]:
        wishes = Member(join, leave) if world.rank == 1 else Member()
        trainer = member_trainer(world, lag=lag, membership=wishes)
        trainer.fit()
        return trainer.step, trainer.regrouping, trainer.stopped_by

    assert together(3, run) == [(5 if lag else 4, True, 0)] * 3


def test_when_all_want_to_leave_the_run_stops() -> None:
    def run(world: World) -> tuple[int, int]:
        trainer = member_trainer(world, membership=Member(leave=3))
        trainer.fit()
        return trainer.step, trainer.stopped_by

    assert together(2, run) == [(4, 15)] * 2
