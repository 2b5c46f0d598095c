"""The plan of an epoch: disjoint, complete, independent of processes; the short last step; too large minibatches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_lb.errors import UserError
from hvd_lb.plan.hosting import hosted
from hvd_lb.plan.per_worker import PerWorkerPlan
from hvd_lb.plan.samples import LastBatch, SamplePlan
from hvd_lb.plan.shuffle import Permutation

plans = st.builds(
    SamplePlan,
    images=st.integers(1, 400),
    workers=st.integers(1, 12),
    per_worker=st.integers(1, 9),
    seed=st.integers(0, 5),
    last_batch=st.just("keep"),
)


def epoch_ids(plan: SamplePlan, epoch: int) -> list[int]:
    return [
        int(image)
        for step in range(plan.steps_per_epoch)
        for worker in range(plan.workers)
        for image in plan.image_ids(epoch, step, worker)
    ]


@settings(max_examples=60)
@given(plans, st.integers(0, 3))
def test_keep_serves_every_image_once(plan: SamplePlan, epoch: int) -> None:
    assert sorted(epoch_ids(plan, epoch)) == list(range(plan.images))
    images = [plan.step_images(step) for step in range(plan.steps_per_epoch)]
    assert sum(images) == plan.images
    assert 0 < images[-1] <= plan.global_batch
    assert plan.dropped_per_epoch == 0


@pytest.mark.slow
@settings(max_examples=60)
@given(plans, st.integers(0, 3))
def test_drop_serves_whole_steps_and_counts_the_rest(plan: SamplePlan, epoch: int) -> None:
    if plan.global_batch > plan.images:
        return
    plan = SamplePlan(plan.images, plan.workers, plan.per_worker, plan.seed, "drop")
    ids = epoch_ids(plan, epoch)
    assert len(ids) == len(set(ids)) == plan.images - plan.dropped_per_epoch
    assert plan.dropped_per_epoch < plan.global_batch
    assert {plan.step_images(step) for step in range(plan.steps_per_epoch)} == {plan.global_batch}


@settings(max_examples=60)
@given(plans, st.integers(1, 12))
def test_processes_share_the_step_whatever_their_number(plan: SamplePlan, processes: int) -> None:
    processes = min(processes, plan.workers)
    last = plan.steps_per_epoch - 1
    shared = [w for rank in range(processes) for w in hosted(rank, processes, plan.workers)]
    assert shared == list(range(plan.workers))
    sizes = [len(hosted(rank, processes, plan.workers)) for rank in range(processes)]
    assert max(sizes) - min(sizes) <= 1
    counts = [len(plan.positions(last, worker)) for worker in range(plan.workers)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == plan.step_images(last)
    assert plan.active_workers(last) == sum(count > 0 for count in counts)
    assert plan.smallest_microbatch == min(filter(None, counts))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9))
def test_groups_are_hosted_whole(workers: int, group: int, processes: int) -> None:
    processes = min(processes, -(-workers // group))
    ranges = [hosted(rank, processes, workers, group) for rank in range(processes)]
    assert [worker for own in ranges for worker in own] == list(range(workers))
    assert all(len(own) and own.start % group == 0 for own in ranges)
    groups = [-(-len(own) // group) for own in ranges]
    assert max(groups) - min(groups) <= 1


@settings(max_examples=60)
@given(plans, st.integers(0, 3), st.integers(1, 12), st.sampled_from(["drop", "keep"]))
def test_what_a_step_sees_does_not_depend_on_processes(
    plan: SamplePlan, epoch: int, processes: int, last_batch: LastBatch
) -> None:
    """Put together from any number of processes, a step is the next part of the epoch's permutation."""
    if plan.global_batch > plan.images:
        last_batch = "keep"
    plan = SamplePlan(plan.images, plan.workers, plan.per_worker, plan.seed, last_batch)
    order = Permutation(plan.images, plan.seed, epoch).slice(0, plan.images)
    for step in range(plan.steps_per_epoch):
        shared = [
            [plan.image_ids(epoch, step, worker) for worker in hosted(rank, processes, plan.workers)]
            for rank in range(processes)
        ]
        seen = np.concatenate([ids for process in shared for ids in process])
        start = step * plan.global_batch
        assert np.array_equal(seen, order[start : start + plan.step_images(step)])


@settings(max_examples=60)
@given(st.integers(40, 400), st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 1000))
def test_other_epochs_and_seeds_have_other_orders(images: int, seed: int, epoch: int, more: int) -> None:
    """Of at least 40! orders, two are the same by chance in no lifetime."""
    here = SamplePlan(images, 1, images, seed).image_ids(epoch, 0, 0)
    assert not np.array_equal(here, SamplePlan(images, 1, images, seed).image_ids(epoch + more, 0, 0))
    assert not np.array_equal(here, SamplePlan(images, 1, images, seed + more).image_ids(epoch, 0, 0))


def test_virtual_worker_j_takes_the_jth_n_of_a_step() -> None:
    plan = SamplePlan(1000, 4, 16, seed=9)
    whole = np.concatenate([plan.image_ids(2, 3, worker) for worker in range(4)])
    assert np.array_equal(whole, Permutation(1000, 9, 2).slice(3 * 64, 4 * 64))


@pytest.mark.parametrize(
    ("gpus", "per_gpu", "images", "told"),
    [
        (256, 32, 1437, "at most 44 workers at 32 images each, or last_batch keep"),
        (4, 2000, 1437, "at most 1437 images per worker, or last_batch keep"),
    ],
)
def test_a_minibatch_larger_than_the_data_names_the_largest(
    gpus: int, per_gpu: int, images: int, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        SamplePlan(images, gpus, per_gpu, 0)
    kept: LastBatch = "keep"
    assert SamplePlan(images, gpus, per_gpu, 0, kept).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"last_batch": "Keep"}, "last_batch 'Keep': expected one of drop, keep; did you mean 'keep'"),
        ({"last_batch": None}, "last_batch None: expected one of drop, keep"),
        ({"seed": None}, "seed None: expected a whole number, 0 or more"),
        ({"images": 10.5}, "images 10.5: expected a whole number, 1 or more"),
        ({"workers": 0}, "workers 0: expected a whole number, 1 or more"),
    ],
)
def test_what_is_no_plan(changes: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        SamplePlan(**{"images": 60, "workers": 4, "per_worker": 8, "seed": 0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [SamplePlan, PerWorkerPlan])
def test_a_worker_that_there_is_not(plan: type[SamplePlan]) -> None:
    for worker in (-1, 4):
        with pytest.raises(ValueError, match=f"worker {worker} of 4: expected 0 to 3"):
            plan(60, 4, 8, 0).image_ids(0, 0, worker)


def test_an_epoch_of_whole_steps_has_no_rest_to_keep() -> None:
    assert SamplePlan(60, 4, 5, 0, "keep").steps_per_epoch == SamplePlan(60, 4, 5, 0).steps_per_epoch == 3


def test_imagenet_with_256_gpus() -> None:
    plan = SamplePlan(1_281_167, 256, 32, 0)
    assert (plan.steps_per_epoch, plan.dropped_per_epoch) == (156, 3215)


def test_a_later_epoch_is_not_the_epoch_of_another_seed() -> None:
    """(seed, epoch) is a pair: runs with neighbouring seeds share no order at all."""
    orders = {
        tuple(SamplePlan(100, 1, 100, seed).image_ids(epoch, 0, 0).tolist())
        for seed in range(6)
        for epoch in range(6)
    }
    assert len(orders) == 36
