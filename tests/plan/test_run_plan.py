"""A run over changes of k: each image of an epoch once, epochs where they were, and the rates that belong to them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_lb.errors import UserError
from hvd_lb.plan.run_plan import RunPlan, Scale
from hvd_lb.plan.samples import LastBatch, SamplePlan
from hvd_lb.recipe import Recipe, make_recipe

thrifty = settings(max_examples=40)


@st.composite
def runs(draw: st.DrawFn) -> RunPlan:
    """With changes of k at any steps, some of them at the same one."""
    last_batch: LastBatch = draw(st.sampled_from(["drop", "keep"]))
    per_worker, most = draw(st.integers(1, 3)), 5
    images = draw(st.integers(most * per_worker, 60))
    plan = SamplePlan(images, draw(st.integers(1, most)), per_worker, seed=draw(st.integers(0, 9)),
                      last_batch=last_batch)  # fmt: skip
    run = RunPlan(plan, epochs=draw(st.integers(1, 4)))
    step = 0
    for _ in range(draw(st.integers(0, 6))):
        step = draw(st.integers(step, run.end))
        run = RunPlan(plan, run.epochs, run.rescaled(step, draw(st.integers(1, most))))
    return run


@thrifty
@given(runs())
def test_each_image_of_an_epoch_comes_once(run: RunPlan) -> None:
    steps = [run.at(step) for step in range(run.end)]
    epochs = [step.epoch for step in steps]
    assert epochs == sorted(epochs)
    used: dict[int, list[int]] = {}
    for step in steps:
        of = used.setdefault(step.epoch, [])
        assert step.begins == len(of)  # where the one before has ended
        of += [int(image) for worker in range(step.plan.workers) for image in step.image_ids(worker)]
        assert len(of) - step.begins == step.images
    images = run.plan.images
    for epoch in range(run.epochs):
        whole = SamplePlan(images, 1, images, run.plan.seed).image_ids(epoch, 0, 0).tolist()
        found = used.get(epoch, [])
        assert found == whole[: len(found)]
        if run.plan.last_batch == "keep":
            assert Counter(found) == Counter(range(images))
        else:  # less than a minibatch is left, of the k that the epoch has ended with
            most = max(scale.workers for scale in run.scales) * run.plan.per_worker
            assert images - len(found) < most


@thrifty
@given(runs())
def test_epochs_end_where_the_offset_says(run: RunPlan) -> None:
    last = run.scales[-1].step
    for step in range(last, run.end):
        planned = run.at(step)
        assert planned.epoch == (step - run.offset) // run.plan.steps_per_epoch
        if step > last:
            first = (step - run.offset) % run.plan.steps_per_epoch == 0
            assert first == (planned.begins == 0)
    assert run.at(run.end).epoch == run.epochs


@thrifty
@given(runs())
def test_the_virtual_step_is_the_place_in_epochs(run: RunPlan) -> None:
    """Also where a change came within a step of the minibatch that is from there on."""
    last, plan = run.parts[-1], run.plan
    for step in range(last.scale.step, run.end):
        planned = run.at(step)
        place = planned.epoch * plan.steps_per_epoch + planned.begins / plan.global_batch
        assert last.virtual_step(step) == pytest.approx(place, rel=1e-12)


@thrifty
@given(runs(), st.integers(1, 5))
def test_a_change_that_is_taken_back_before_a_step_was_none(run: RunPlan, workers: int) -> None:
    step = min(run.scales[-1].step + 1, run.end)
    scales = run.rescaled(step, run.plan.workers)
    there = RunPlan(run.plan, run.epochs, run.rescaled(step, workers))
    assert there.rescaled(step, run.plan.workers) == scales == run.scales


def test_a_run_without_changes_is_its_plan() -> None:
    plan = SamplePlan(100, 3, 4, seed=1)
    run = RunPlan(plan, 3)
    assert (run.end, run.offset, run.scales) == (24, 0, (Scale(0, 0, 0, 3),))
    for step in range(run.end):
        epoch, within = divmod(step, plan.steps_per_epoch)
        planned = run.at(step)
        assert (planned.epoch, planned.step, planned.plan) == (epoch, within, plan)
        assert run.parts[0].virtual_step(step) == step


def test_half_of_the_workers_go_on_at_the_very_image() -> None:
    run = RunPlan(SamplePlan(100, 4, 5, seed=1), 2)
    run = RunPlan(run.plan, 2, run.rescaled(3, 2))
    assert run.scales[-1] == Scale(3, 0, 60, 2)
    assert [run.at(step).begins for step in range(9)] == [0, 20, 40, 60, 70, 80, 90, 0, 10]
    assert run.end == 3 + 4 + 10
    with pytest.raises(UserError, match="at most 20 workers"):
        run.rescaled(5, 30) and RunPlan(run.plan, 2, run.rescaled(5, 30))


def recipe(**changes: object) -> Recipe:
    return make_recipe({"gpus": 8, "per_gpu_batch": 128, "learning_rate": 0.1, "epochs": 90, **changes})


def rates(of: Recipe, images: int, *changes: tuple[int, int]) -> tuple[RunPlan, list[float]]:
    run = of.run_plan(images)
    for step, workers in changes:
        run = of.run_plan(images, scales=run.rescaled(step, workers))
    schedule = of.run_schedule(run)
    return run, [schedule(step) for step in range(run.end)]


def test_a_run_without_changes_has_its_schedule() -> None:
    of = recipe()
    run, found = rates(of, 20_000)
    schedule = of.lr_schedule(of.sample_plan(20_000).steps_per_epoch)
    assert found == [schedule(step) for step in range(run.end)]


@pytest.mark.parametrize("last_batch", ["drop", "keep"])
def test_drops_come_at_the_same_epochs(last_batch: str) -> None:
    """k halves in the middle of epoch 10 and is back in epoch 40: rates follow it, and drops come when they should."""
    of = recipe(last_batch=last_batch)
    run, found = rates(of, 20_480, (10 * 20 + 7, 4), (10 * 20 + 7 + 26 + 29 * 40 + 11, 8))
    assert (
        run.end
        == 10 * 20 + 7 + 26 + 29 * 40 + 11 + (20_480 - 11 * 512) // 1024 + (last_batch == "keep") + 49 * 20
    )
    first_of = {run.at(step).epoch: step for step in reversed(range(run.end))}
    for epoch, rate in ((5, 0.4), (10, 0.4), (11, 0.2), (29, 0.2), (30, 0.02), (39, 0.02), (45, 0.04), (59, 0.04),
                        (60, 0.004), (80, 0.0004)):  # fmt: skip
        assert found[first_of[epoch]] == pytest.approx(rate, rel=1e-12), epoch
    # By nothing else than these.
    falls = [run.at(step).epoch for step, (a, b) in enumerate(pairwise(found), 1) if b < 0.99 * a]
    assert falls == [10, 30, 60, 80]
    rises = [step for step, (a, b) in enumerate(pairwise(found), 1) if b > 1.000001 * a and step > 100]
    assert {run.at(step).epoch for step in rises} == {40, 41}


def test_a_rate_rises_gradually_and_falls_at_once() -> None:
    of = recipe(warmup="none", schedule="step", momentum=0.5)  # 20 steps, and an epoch has 20
    run, found = rates(of, 20_480, (105, 4), (150, 8))
    assert found[104] == 0.4
    assert found[105] == found[149] == 0.2
    rising = found[150:170]
    assert rising[0] == pytest.approx(found[149])
    steps = [b - a for a, b in pairwise([*rising, found[170]])]
    assert steps == pytest.approx([0.2 / 20] * 20)
    assert set(found[170:400]) == {0.4}
    assert run.at(105).images == 512


def test_a_ramp_that_a_further_change_meets_goes_on_from_where_it_is() -> None:
    of = recipe(warmup="none", momentum=0.5)
    _, found = rates(of, 20_480, (105, 4), (150, 8), (155, 12))
    assert found[155] == pytest.approx(0.25)
    assert found[155 + 13] == pytest.approx(0.6)  # an epoch has 13 steps now
    assert max(b / a for a, b in pairwise(found[105:200])) < 1.12


@thrifty
@given(st.integers(1, 39), st.integers(1, 8), st.sampled_from(["step", "cosine", "polynomial"]))
def test_within_warmup_and_decay_a_rate_is_that_of_its_place(change: int, workers: int, shape: str) -> None:
    """It is that of the run that has had this k all the time, once it has risen to it."""
    of = recipe(epochs=4, warmup_epochs=2, drop_epochs=(70,), schedule=shape, momentum=0.0, nesterov=False)
    run, found = rates(of, 20_480, (change, workers))
    alone = of.rescaled(workers)
    schedule = alone.lr_schedule(alone.sample_plan(20_480).steps_per_epoch)
    place = run.parts[-1].virtual_step
    for step in range(change, run.end):
        rate = schedule(place(step))
        assert found[step] == rate if step >= change + 10 else found[step] <= rate
