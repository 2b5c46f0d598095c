"""The permutation against what is expected of one that was drawn at random. Seeds are fixed: a bound holds or not."""

import math

import numpy as np
import pytest
from scipy import stats

from hvd_lb.plan.shuffle import Permutation

LIKELY = 1e-4  # a test statistic less likely than this fails; there are about 60 in this file


def order(size: int, seed: int, epoch: int = 0) -> np.ndarray:
    return Permutation(size, seed, epoch).slice(0, size)


@pytest.mark.slow  # all 299 together
@pytest.mark.parametrize("size", range(1, 300))
def test_every_small_size_is_bijective_for_many_keys(size: int) -> None:
    for seed in range(8):
        for epoch in range(3):
            assert np.array_equal(np.sort(order(size, seed, epoch)), np.arange(size))


@pytest.mark.parametrize("size", [97, 1000, 4096, 65_537])
def test_an_image_is_anywhere_with_the_same_probability(size: int) -> None:
    """Positions and images in 16 parts each: all 256 pairs are equally frequent."""
    counts = np.zeros((16, 16))
    for seed in range(max(4, 200_000 // size)):
        image = order(size, seed)
        np.add.at(counts, (np.arange(size) * 16 // size, image * 16 // size), 1)
    rows, columns = counts.sum(1), counts.sum(0)
    expected = np.outer(rows, columns) / counts.sum()
    # Row and column sums are fixed: fewer degrees of freedom than cells.
    assert stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), 15 * 15) > LIKELY


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 1, 49, 98, 99])
def test_each_position_alone_holds_any_image(position: int) -> None:
    seen = [int(Permutation(100, seed, 0)(np.array([position]))[0]) for seed in range(20_000)]
    assert stats.chisquare(np.bincount(seen, minlength=100)).pvalue > LIKELY


@pytest.mark.parametrize("lag", [1, 2, 3, 31, 32, 256, 1132])
def test_neighbours_in_the_order_are_unrelated(lag: int) -> None:
    images = order(1_281_167, 5)
    assert abs(np.corrcoef(images[lag:], images[:-lag])[0, 1]) < 4.5 / math.sqrt(len(images))
    # Nor are they unrelated in size but near in value: a gap is as frequent as between two images at random.
    gaps = np.abs(np.diff(images[::1][: 400_000 // lag * lag : lag]))
    share = np.mean(gaps < len(images) // 10)  # of all pairs, 0.19 are closer than a tenth
    assert abs(share - 0.19) < 4.5 * math.sqrt(0.19 * 0.81 / len(gaps)) * 1.2


@pytest.mark.slow
def test_the_number_of_fixed_points_is_that_of_random_permutations() -> None:
    """Poisson with mean 1."""
    found = [int(np.count_nonzero(order(60, seed) == np.arange(60))) for seed in range(4000)]
    expected = [stats.poisson.pmf(k, 1) * 4000 for k in range(5)]
    counts = [found.count(k) for k in range(5)]
    chi_squared = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    rest, rest_expected = 4000 - sum(counts), 4000 - sum(expected)
    assert stats.chi2.sf(chi_squared + (rest - rest_expected) ** 2 / rest_expected, 5) > LIKELY


def cycle_lengths(permutation: np.ndarray) -> list[int]:
    left, lengths = set(range(len(permutation))), []
    while left:
        start = at = left.pop()
        length = 1
        while (at := int(permutation[at])) != start:
            left.remove(at)
            length += 1
        lengths.append(length)
    return lengths


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 12, 40])
def test_cycles_are_those_of_random_permutations(size: int) -> None:
    """The cycle of a given image has each length with probability 1/N; the mean number of cycles is H_N."""
    draws = 3000
    of_first, numbers = np.zeros(size), []
    for seed in range(draws):
        images = order(size, seed)
        at, length = int(images[0]), 1
        while at != 0:
            at, length = int(images[at]), length + 1
        of_first[length - 1] += 1
        numbers.append(len(cycle_lengths(images)))
    assert stats.chisquare(of_first).pvalue > LIKELY
    harmonic = sum(1 / i for i in range(1, size + 1))
    variance = harmonic - sum(1 / i**2 for i in range(1, size + 1))
    assert abs(np.mean(numbers) - harmonic) < 4 * math.sqrt(variance / draws)


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 11])
def test_odd_and_even_permutations_are_equally_frequent(size: int) -> None:
    """An even number of rounds of some ciphers gives only even permutations."""
    even = sum((size - len(cycle_lengths(order(size, seed)))) % 2 == 0 for seed in range(3000))
    assert stats.binomtest(even, 3000).pvalue > LIKELY


@pytest.mark.parametrize(("other_seed", "other_epoch"), [(0, 1), (1, 0), (0, 2), (2**31, 0), (1, 1)])
def test_epochs_and_seeds_are_independent(other_seed: int, other_epoch: int) -> None:
    size = 50_000
    first, second = order(size, 0), order(size, other_seed, other_epoch)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / math.sqrt(size)
    # As maps of one to the other they are random too: about one image keeps its place.
    assert np.count_nonzero(first == second) < 9
    shared = len(np.intersect1d(first[: size // 10], second[: size // 10]))  # a tenth of a tenth
    assert abs(shared - size / 100) < 4.5 * math.sqrt(size / 100 * 0.9 * 0.9)


def test_a_huge_epoch_costs_no_memory_and_is_spread_evenly() -> None:
    size = 10**9
    permutation = Permutation(size, 3, 7)
    images = np.concatenate([permutation.slice(start, start + 20_000) for start in range(0, size, 10**8)])
    assert len(np.unique(images)) == len(images)
    assert stats.kstest(images / size, "uniform").pvalue > LIKELY
