"""The permutation: bijective, a function of (N, seed, epoch) alone, and random enough."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_lb.plan.shuffle import Permutation


@pytest.mark.parametrize("size", [*range(1, 130), 255, 256, 257, 1000, 1024, 4095, 65_537, 300_000])
def test_bijective(size: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, 3, 5).slice(0, size)), np.arange(size))


@settings(max_examples=50)
@given(st.integers(1, 10**12), st.integers(0, 2**32 - 1), st.integers(0, 1000), st.data())
def test_a_slice_is_its_positions_one_by_one(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    stop = min(size, start + data.draw(st.integers(0, 40)))
    permutation = Permutation(size, seed, epoch)
    whole = permutation.slice(start, stop)
    assert whole.dtype == np.int64
    assert [int(permutation(np.array([i]))[0]) for i in range(start, stop)] == whole.tolist()
    assert len(set(whole.tolist())) == stop - start
    assert all(0 <= image < size for image in whole)


@pytest.mark.slow
def test_all_orders_of_four_are_equally_likely() -> None:
    counts = Counter(tuple(Permutation(4, seed, 0).slice(0, 4)) for seed in range(1200))
    assert len(counts) == math.factorial(4)
    chi_squared = sum((count - 50) ** 2 / 50 for count in counts.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001; the seeds are fixed


def test_no_trace_of_the_order_is_left() -> None:
    size = 100_000
    order = Permutation(size, 0, 0).slice(0, size)
    other = Permutation(size, 0, 1).slice(0, size)
    bound = 4 / math.sqrt(size)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < bound
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < bound
    assert abs(np.corrcoef(order, other)[0, 1]) < bound
    assert np.count_nonzero(order == np.arange(size)) < 8  # a random permutation has 1 fixed point on average


def test_epochs_seeds_and_sizes_differ() -> None:
    orders = {
        tuple(Permutation(size, seed, epoch).slice(0, 50))
        for size in (1000, 1001)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run depends on it."""
    assert Permutation(10, 0, 0).slice(0, 10).tolist() == EXPECTED_10
    assert Permutation(1_281_167, 7, 3).slice(1_000_000, 1_000_004).tolist() == EXPECTED_IMAGENET


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, 0, 0)
    with pytest.raises(ValueError, match="of a permutation of 5 items"):
        Permutation(5, 0, 0).slice(3, 6)


EXPECTED_10 = [2, 9, 4, 8, 0, 6, 1, 7, 5, 3]
EXPECTED_IMAGENET = [1452, 734987, 1280416, 654352]
