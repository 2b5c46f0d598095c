"""Balanced sampling, repeated augmentation and class weights: counted over whole runs, and p is nowhere."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvd_lb.errors import UserError
from hvd_lb.plan.augment import RandomWindows
from hvd_lb.plan.classes import Balanced, class_weights
from hvd_lb.plan.samples import LastBatch, SamplePlan
from hvd_lb.training.models import sum_loss

LABELS = np.array([2] * 30 + [0] * 5 + [1] * 65)[np.random.default_rng(0).permutation(100)]


def epoch_of(plan: SamplePlan, epoch: int) -> list[np.ndarray]:
    """Ids and keys, one row an image, of each step."""
    return [
        np.concatenate([np.stack(plan.draws(epoch, step, worker), 1) for worker in range(plan.workers)])
        for step in range(plan.steps_per_epoch)
    ]


def test_each_class_comes_equally_often_and_each_of_its_images() -> None:
    plan = SamplePlan(100, 5, 4, seed=1, balanced=Balanced(LABELS, 1))
    seen: Counter[int] = Counter()
    for epoch in range(13):
        ids = np.concatenate(epoch_of(plan, epoch))[:, 0]
        assert sorted(Counter(LABELS[ids]).values()) == [33, 33, 34]
        seen.update(ids.tolist())
        for label in range(3):
            times = [seen[image] for image in np.flatnonzero(label == LABELS).tolist()]
            assert max(times) - min(times) <= 1, (epoch, label)
    assert len(seen) == 100


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 4),
)
@settings(max_examples=40)
def test_keys_of_an_epoch_differ_and_ids_are_in_them(
    labels: list[int], workers: int, n: int, repeats: int
) -> None:
    """Of every plan: no two occurrences of an image have the same random numbers."""
    of = np.array(labels)
    for balanced in (None, Balanced(of, 3)):
        plan = SamplePlan(
            len(of), workers, n, 3, "keep", repeats=min(repeats, workers * n), balanced=balanced
        )  # fmt: skip
        for epoch in (0, 1, 5):
            ids, keys = np.concatenate(epoch_of(plan, epoch)).T
            assert len(ids) == len(of)
            assert len(set(keys.tolist())) == len(keys)
            assert (keys & ((1 << 40) - 1) == ids).all()
            assert ids.min() >= 0
            assert ids.max() < len(of)


@pytest.mark.parametrize("repeats", [2, 3])
def test_an_image_that_ends_a_pass_and_begins_the_next_within_an_epoch_has_other_keys(repeats: int) -> None:
    again = 0
    for seed in range(20):
        plan = SamplePlan(5, 1, 4, seed, "keep", repeats=repeats)
        for epoch in range(10):
            ids, keys = np.concatenate(epoch_of(plan, epoch)).T
            assert len(set(keys.tolist())) == len(keys)
            again += max(Counter(ids.tolist()).values()) > repeats
    assert again > 5


def test_by_default_the_key_is_the_image() -> None:
    plan = SamplePlan(100, 5, 4, seed=1)
    for step in epoch_of(plan, 3):
        assert (step[:, 0] == step[:, 1]).all()


@pytest.mark.parametrize("last_batch", ["drop", "keep"])
@pytest.mark.parametrize(("workers", "n", "repeats"), [(6, 4, 3), (5, 4, 3), (1, 24, 4), (6, 4, 24)])
def test_a_minibatch_has_its_images_so_many_times(
    workers: int, n: int, repeats: int, last_batch: LastBatch
) -> None:
    plan = SamplePlan(250, workers, n, seed=1, last_batch=last_batch, repeats=repeats)
    seen: Counter[int] = Counter()
    for epoch in range(repeats):
        for number, step in enumerate(epoch_of(plan, epoch)):
            assert len(step) == plan.step_images(number)
            counts = Counter(step[:, 0].tolist()).values()
            if len(step) % repeats == 0:
                assert set(counts) == {repeats}
            assert max(counts) <= repeats + 1  # the end of one pass and the beginning of the next
            assert sum(count < repeats for count in counts) <= repeats
            seen.update(set(step[:, 0].tolist()))
    # None again before all others.
    assert max(seen.values()) - min((seen[image] for image in range(250)), default=0) <= 1


def test_copies_are_of_other_virtual_workers_with_other_windows() -> None:
    plan = SamplePlan(240, 6, 4, seed=1, repeats=3)
    windows = RandomWindows(7)
    places = defaultdict(list)
    for worker in range(6):
        ids, keys = plan.draws(2, 1, worker)
        assert len(set(ids.tolist())) == 4
        sizes = np.full(4, 500)
        drawn = windows.windows(2, keys, sizes, sizes)
        for at, image in enumerate(ids.tolist()):
            places[image].append((worker, int(drawn.x[at]), int(drawn.width[at])))
    assert len(places) == 8
    for of in places.values():
        assert len({worker for worker, _, _ in of}) == len(of) == 3
        assert len({(x, width) for _, x, width in of}) == 3


def test_classes_of_one_size_have_orders_of_their_own() -> None:
    """Else the same places of each class would always come in the same epochs."""
    labels = np.repeat([0, 1, 2], [100, 100, 10])
    ids, times = Balanced(labels, 1)(0, np.arange(210))
    first, second = (set((ids[labels[ids] == label] - 100 * label).tolist()) for label in (0, 1))
    assert len(first) == len(second) == 70
    assert len(first & second) < 60  # 49 by chance
    assert times.max() == 6


def test_balanced_and_repeated() -> None:
    plan = SamplePlan(100, 5, 4, seed=1, repeats=4, balanced=Balanced(LABELS, 1))
    seen: Counter[int] = Counter()
    for epoch in range(4):
        for step in epoch_of(plan, epoch):
            seen.update(LABELS[step[:, 0]].tolist())
    assert max(seen.values()) - min(seen.values()) <= 4


def test_more_repeats_than_images_of_a_minibatch() -> None:
    with pytest.raises(UserError, match="repeats 9, but a minibatch has 8 images"):
        SamplePlan(100, 2, 4, seed=1, repeats=9)


def test_balanced_weights_are_those_of_the_usual_formula() -> None:
    """N / (C n_c), as scikit-learn's; a class without images has none, and further outputs neither."""
    drawn = np.array([10, 0, 30, 60])
    assert class_weights("balanced", drawn, 5) == pytest.approx([100 / 30, 0, 100 / 90, 100 / 180, 0])
    for size in (1e307, 1e-307):
        assert class_weights((size, 7 * size, 2 * size, 2 * size), drawn) == pytest.approx(
            np.array([1, 7, 2, 2]) * 100 / 190
        )
    with pytest.raises(UserError, match="all images are of classes of weight 0"):
        class_weights((0.0, 1.0, 0.0, 0.0), drawn)
    assert class_weights((1.0, 7.0, 2.0, 2.0), drawn) == pytest.approx(np.array([1, 7, 2, 2]) * 100 / 190)


def test_no_other_word_is_taken_for_balanced() -> None:
    with pytest.raises(
        UserError, match="class_weights 'weights.txt': expected balanced, or a number for each class"
    ):
        class_weights("weights.txt", np.array([1, 2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_loss_over_all_images_is_torchs_mean(smoothing: float) -> None:
    torch.manual_seed(0)
    labels = torch.from_numpy(LABELS)
    logits = torch.randn(100, 3, dtype=torch.float64)
    weights = torch.from_numpy(class_weights((0.5, 3.0, 1.0), np.bincount(LABELS)))
    ours = sum(
        sum_loss(smoothing, weights)(*part) for part in zip(logits.split(30), labels.split(30), strict=True)
    )
    plain = nn.CrossEntropyLoss(torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64), label_smoothing=smoothing)
    assert float(ours) / 100 == pytest.approx(plain(logits, labels).item(), rel=1e-12)
