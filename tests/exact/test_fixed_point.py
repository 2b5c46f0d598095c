"""Sums in fixed point: the same bits in every order and division, as accurate as promised, never silently wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_lb.exact.fixed_point import GROWTH_BITS, FixedPointSum
from hvd_lb.world.solo import Solo


class Team:
    """Processes of one interpreter that take turns: a reduction ends when all have started theirs."""

    def __init__(self, size: int):
        self.tensors: dict[str, list[Tensor]] = {}
        self.members = [Member(self, size) for _ in range(size)]


class Member:
    def __init__(self, team: Team, size: int):
        self.team, self.size = team, size

    def allreduce_async(self, tensor: Tensor, name: str) -> Any:
        return self.start(tensor, name, lambda all_of_them: all_of_them.sum(0))

    def maximum_async(self, tensor: Tensor, name: str) -> Any:
        return self.start(tensor, name, lambda all_of_them: all_of_them.amax(0))

    def start(self, tensor: Tensor, name: str, reduce: Any) -> Any:
        started = self.team.tensors.setdefault(name, [])
        started.append(tensor)

        class Handle:
            def wait(_self) -> Tensor:  # noqa: N805
                if len(started) == self.size:
                    result = reduce(torch.stack(started))
                    for mine in started:
                        mine.copy_(result)
                    self.team.tensors[name] = []
                    started.clear()
                return tensor

        return Handle()


def summed(
    parts: Sequence[Sequence[Tensor]], terms: int, sums: list[FixedPointSum] | None = None
) -> list[Tensor]:
    """The sum of all terms, on each process: process r adds `parts[r]` one after the other."""
    like = next(term for part in parts for term in part)
    team = Team(len(parts))
    sums = sums or [FixedPointSum([like], terms, "sum", Solo()) for _ in parts]
    for mine, part, world in zip(sums, parts, team.members, strict=True):
        for term in part:
            mine.add(0, term)
        mine.start(world)  # type: ignore[arg-type]
    results = [torch.empty_like(like) for _ in parts]
    for mine, out in zip(sums, results, strict=True):
        counts, overflowed = mine.finish([out])
        assert counts == [sum(map(len, parts))]
        if overflowed:
            raise OverflowError
    return results


def random_terms(seed: int, count: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Terms whose elements are between 1e-9 and 1e3 in size."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(count, size)) * 10.0 ** rng.uniform(-9, 3, size=(count, size))
    return list(torch.from_numpy(numbers).to(dtype))


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 12), st.data())
def test_no_order_and_no_division_changes_a_bit(seed: int, count: int, data: st.DataObject) -> None:
    terms = random_terms(seed, count, 37)
    (expected,) = summed([terms], count)
    shuffled = data.draw(st.permutations(terms))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    bounds = [0, *cuts, count]
    parts = [shuffled[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    for result in summed(parts, count):
        assert torch.equal(result, expected)


def test_floating_point_would_not_do() -> None:
    """The inputs above are such that the order matters."""
    terms = random_terms(1, 12, 37)
    assert not torch.equal(sum(terms), sum(reversed(terms)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy(dtype: torch.dtype) -> None:
    """Each of 256 terms is off by half a unit of 2^-43 of the largest, and the sum is rounded once."""
    sums = [FixedPointSum([torch.zeros(1000, dtype=dtype)], 256, "sum", Solo())]
    summed([random_terms(2, 256, 1000, dtype)], 256, sums)
    terms = random_terms(3, 256, 1000, dtype)
    (result,) = summed([terms], 256, sums)
    columns = torch.stack(terms).double().T.tolist()
    exact = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    largest = max(float(term.abs().max()) for term in terms)
    rounding = 2.0**-24 * exact.abs() if dtype == torch.float32 else 0.0
    error = (result.double() - exact).abs()
    assert (error <= rounding + 256 * largest * 2.0**-43 / 2).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_stays_so_on_every_process(poison: float, where: int) -> None:
    parts = [[torch.ones(3)], [torch.ones(3)]]
    parts[where][0][1] = poison
    for result in summed(parts, 2):
        assert result.isnan().all()


@pytest.mark.parametrize("large", [1e30, 3e38, -1e30])
def test_terms_that_are_too_large_are_found_and_fit_the_second_time(large: float) -> None:
    """1e30 and NaN both become the smallest int64: nothing after the conversion could tell."""
    parts = [[torch.ones(3)], [torch.full((3,), large)]]
    sums = [FixedPointSum([torch.zeros(3)], 2, "sum", Solo()) for _ in parts]
    with pytest.raises(OverflowError):
        summed(parts, 2, sums)
    for other in sums[1:]:  # the second process was not asked above
        other.exponents = list(sums[0].exponents)
        other.discard()
        other._handles = None
    for result in summed(parts, 2, sums):
        torch.testing.assert_close(result, torch.full((3,), 1 + large))


@pytest.mark.parametrize("sign", [1, -1])
def test_of_several_tensors_at_once_each_has_its_largest_term(sign: int) -> None:
    """Also where that is below zero."""
    terms = [torch.tensor([1.0, -2.0]), sign * torch.tensor([1e30, 0.5, 3.0]), torch.tensor([0.25])]
    exact, out = FixedPointSum(terms, 4, "sum", Solo()), [torch.zeros_like(term) for term in terms]
    exact.add_to_each(terms)
    exact.start(Solo())
    assert exact.finish(out)[1] == [1]
    exact.add_to_each(terms)
    exact.start(Solo())
    assert exact.finish(out)[1] == []
    assert all(
        torch.equal(found, term) for found, term in zip(out, terms, strict=True) if term is not terms[1]
    )
    assert out[1][0] == terms[1][0]


def test_growth_up_to_the_promised_factor_fits() -> None:
    (one,) = sums = [FixedPointSum([torch.zeros(1)], 8, "sum", Solo())]
    summed([[torch.ones(1)] * 8], 8, sums)
    exponents = list(one.exponents)
    (result,) = summed([[torch.full((1,), 2.0**GROWTH_BITS)] * 8], 8, sums)
    assert result.item() == 8 * 2.0**GROWTH_BITS
    assert one.exponents[0] == exponents[0] - GROWTH_BITS
    with pytest.raises(OverflowError):
        summed([[torch.full((1,), 2.0 ** (2 * GROWTH_BITS + 2))]], 8, sums)


def test_the_largest_sum_does_not_overflow() -> None:
    """All terms at the very limit: 2^62 and no more."""
    (one,) = sums = [FixedPointSum([torch.zeros(1, dtype=torch.float64)], 256, "sum", Solo())]
    limit = 2.0 ** (62 - 8 - one.exponents[0])
    (result,) = summed([[torch.full((1,), limit, dtype=torch.float64)] * 256], 256, sums)
    assert result.item() == 256 * limit


def test_zeros_tell_nothing_about_the_next_terms() -> None:
    (one,) = sums = [FixedPointSum([torch.zeros(2)], 2, "sum", Solo())]
    before = list(one.exponents)
    (result,) = summed([[torch.zeros(2)]], 2, sums)
    assert result.tolist() == [0, 0]
    assert one.exponents == before


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("value", [-0.0, -1e-40])
def test_a_zero_has_no_sign(value: float, terms: int) -> None:
    """An integer has none: where a term is 0 may not show by the sign of the sum."""
    term = torch.full((3,), value)
    for add in (lambda exact: exact.add(0, term), lambda exact: exact.add_to_each([term])):
        exact, out = FixedPointSum([term], terms, "sum", Solo()), torch.ones(3)
        for _ in range(terms):
            add(exact)
        exact.start(Solo())
        exact.finish([out])
        assert out.tolist() == [0.0] * 3
        assert not out.signbit().any()


def test_tiny_terms_keep_their_bits() -> None:
    tiny = [torch.tensor([1.25e-38, -3e-39])]
    (one,) = sums = [FixedPointSum([torch.zeros(2)], 1, "sum", Solo())]
    summed([[torch.full((2,), 1e-30)]], 1, sums)
    (result,) = summed([tiny], 1, sums)
    assert result.isfinite().all()
    assert (result - tiny[0]).abs().max() <= 2.0 ** -one.exponents[0]


def test_more_terms_than_announced_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="a sum of 3 terms, announced were 2"):
        summed([[torch.ones(1)] * 2, [torch.ones(1)]], 2)
    with pytest.raises(ValueError, match="expected at least 1"):
        FixedPointSum([torch.zeros(1)], 0, "sum", Solo())


def test_any_layout_and_half_precision() -> None:
    like = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    term = torch.randn(2, 3, 4, 5)
    one = FixedPointSum([like, torch.zeros(0), torch.zeros(3)], 4, "sum", Solo())
    (world,) = Team(1).members
    one.add(0, term)
    one.add(0, term.to(memory_format=torch.channels_last))
    one.add(1, torch.zeros(0))
    one.add(2, torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    one.start(world)  # type: ignore[arg-type]
    out = [torch.empty_like(like), torch.empty(0), torch.empty(3)]
    assert one.finish(out) == ([2, 1, 1], [])
    torch.testing.assert_close(out[0], 2 * term, rtol=1e-6, atol=1e-6)
    assert out[2].tolist() == [1, 2, 3]


def test_what_was_discarded_is_gone() -> None:
    one = FixedPointSum([torch.zeros(1)], 4, "sum", Solo())
    one.add(0, torch.full((1,), 7.0))
    one.discard()
    assert one.empty
    (result,) = summed([[torch.ones(1)]], 4, [one])
    assert result.item() == 1


@pytest.mark.parametrize("size", [1, 32767, 32768, 32769, 100_000])
def test_pieces_of_any_size_fit_together(size: int) -> None:
    term = torch.arange(size, dtype=torch.float32) % 1000
    (result,) = summed([[term, term]], 2)
    assert torch.equal(result, 2 * term)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_sums_of_few_terms_have_the_bits_of_integers(dtype: torch.dtype, terms: int) -> None:
    """Rounding, terms that cancel, zeros of both signs: against the integers themselves, formed by numpy."""
    values = random_terms(5, terms, 70_001, dtype)
    values[0][:3] = torch.tensor([-0.0, -1e-30, 1e-30])
    values[-1][:3] = torch.tensor([-0.0, -1e-30, -1e-30])
    values[0][10:20], values[-1][10:20] = 1.5, -1.5
    like = torch.zeros(70_001, dtype=dtype)
    parts = [values[:1], [], values[1:]]
    sums = [FixedPointSum([like], terms, "sum", Solo()) for _ in parts]
    summed(parts, terms, sums)  # now exponents are those of such terms
    exponent = sums[0].exponents[0]
    results = summed(parts, terms, sums)
    integers = sum(np.rint(np.ldexp(term.double().numpy(), exponent)).astype(np.int64) for term in values)
    expected = np.ldexp(integers.astype(like.numpy().dtype), -exponent)
    for result in results:
        assert result.numpy().tobytes() == expected.tobytes()
    assert sums[0].exchanged_bytes < (1.01 if terms <= 2 else 8.01 / like.element_size()) * like.nbytes


def test_a_sum_that_was_given_up_on_its_way_is_not_the_next_one() -> None:
    """A process that has added nothing itself has nothing to forget, and the sum of the others was there already."""
    mine, other = (FixedPointSum([torch.zeros(2)], 3, "sum", Solo()) for _ in range(2))
    for value in (1.0, 2.0):
        other.add(0, torch.full((2,), value))
        for each, world in zip((mine, other), Team(2).members, strict=True):
            each.start(world)  # type: ignore[arg-type]
        mine.arrive()
        mine.arrive()
        other.discard()
    found = [torch.zeros(2)]
    assert mine.finish(found) == ([1], [])
    assert found[0].tolist() == [2.0, 2.0]
