"""Workers that keep shares: disjoint, complete, the same in all epochs; within them another order in each epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_lb.plan.hosting import hosted
from hvd_lb.plan.per_worker import PerWorkerPlan
from hvd_lb.plan.samples import LastBatch, SamplePlan
from hvd_lb.recipe import make_recipe


def seen_by(plan: SamplePlan, epoch: int, worker: int) -> list[int]:
    return [
        int(image) for step in range(plan.steps_per_epoch) for image in plan.image_ids(epoch, step, worker)
    ]


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(1, 400), st.integers(1, 12), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_kept_rests_show_every_image_once_to_the_worker_that_keeps_it(
    images: int, workers: int, per_worker: int, seed: int, epoch: int
) -> None:
    plan = PerWorkerPlan(images, workers, per_worker, seed, "keep")
    shares = [sorted(seen_by(plan, 0, worker)) for worker in range(workers)]
    assert sorted(image for share in shares for image in share) == list(range(images))
    assert [len(share) for share in shares] == [
        len(hosted(worker, workers, images)) for worker in range(workers)
    ]
    assert [sorted(seen_by(plan, epoch, worker)) for worker in range(workers)] == shares


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 300), st.sampled_from(["drop", "keep"]))
def test_each_microbatch_has_as_many_images_as_without_shares(
    workers: int, per_worker: int, more: int, last_batch: LastBatch
) -> None:
    numbers = (workers * per_worker + more, workers, per_worker, 3, last_batch)
    plan, usual = PerWorkerPlan(*numbers), SamplePlan(*numbers)
    for step in range(plan.steps_per_epoch):
        for worker in range(workers):
            ids = plan.image_ids(1, step, worker)
            assert ids.shape == usual.image_ids(1, step, worker).shape
            assert len(set(ids.tolist())) == len(ids)


def test_epochs_seeds_and_workers_have_orders_of_their_own() -> None:
    """Of 50 images or more, two orders are the same by chance in no lifetime."""
    plan = PerWorkerPlan(200, 4, 10, 0)
    orders = [seen_by(plan, epoch, worker) for epoch in range(3) for worker in range(4)]
    assert len({tuple(order) for order in orders}) == 12
    places = {tuple(np.argsort(np.argsort(order))) for order in orders[:4]}  # in terms of their shares
    assert len(places) == 4
    assert sorted(seen_by(PerWorkerPlan(200, 4, 10, 1), 0, 0)) != sorted(orders[0])


def test_images_of_two_workers_that_come_together_are_others_in_each_epoch() -> None:
    """Each share has an order of its own: of 50 pairs one comes again by chance."""
    plan = PerWorkerPlan(200, 4, 10, 0)
    epochs = [
        set(zip(seen_by(plan, epoch, 0), seen_by(plan, epoch, worker), strict=True))
        for worker in (1, 3)
        for epoch in (0, 1)
    ]
    assert len(epochs[0] & epochs[1]) < 10
    assert len(epochs[2] & epochs[3]) < 10


def test_what_an_epoch_drops_differs_from_epoch_to_epoch() -> None:
    plan = PerWorkerPlan(43, 2, 10, 0)
    assert plan.dropped_per_epoch == 3
    seen = {image for epoch in range(20) for worker in range(2) for image in seen_by(plan, epoch, worker)}
    assert seen == set(range(43))


def test_a_recipe_chooses_it() -> None:
    recipe = make_recipe({"gpus": 2, "shuffle": "per-worker"})
    assert type(recipe.sample_plan(100)) is PerWorkerPlan
    assert type(make_recipe({"gpus": 2}).sample_plan(100)) is SamplePlan
    assert recipe.mathematics()["shuffle"] == "per-worker"
