from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lb.forecast.step import Compute, Filled, StepTimes, simulate_step, slowest_of, trace_events

COMPUTE = Compute(
    forward=1.0,
    backward=2.0,
    update=0.5,
    buckets=(Filled(10, 0.5), Filled(20, 1.0), Filled(5, 2.0)),
    images=8,
)


def test_without_a_network_a_step_is_its_computing() -> None:
    step = simulate_step(COMPUTE, 1, lambda size: 0.0)
    assert step.seconds == COMPUTE.seconds == step.compute
    assert step.exposed == step.network == 0
    assert step.utilisation == 1


def test_buckets_are_summed_one_after_the_other_beside_backward() -> None:
    step = simulate_step(COMPUTE, 1, lambda size: size / 20)  # 0.5, 1.0 and 0.25 s
    network = [(span.start, span.end) for span in step.spans if span.lane == "network"]
    # full at 1.5, 2.0 and 3.0; the third is free to go at once
    assert network == [(1.5, 2.0), (2.0, 3.0), (3.0, 3.25)]
    assert step.exposed == pytest.approx(0.25)
    assert step.seconds == pytest.approx(3.75)
    slow = simulate_step(COMPUTE, 1, lambda size: size / 10)
    assert slow.exposed == pytest.approx(1.5 + 3.5 - 3.0)


def test_only_the_last_microbatch_fills_buckets() -> None:
    one, three = (simulate_step(COMPUTE, count, lambda size: size / 20) for count in (1, 3))
    assert three.seconds == pytest.approx(one.seconds + 2 * 3.0)
    assert three.exposed == pytest.approx(one.exposed)


def test_an_idle_engine_sees_a_bucket_later_and_a_busy_one_goes_on() -> None:
    step = simulate_step(COMPUTE, 1, lambda size: 0.45, wait=0.1)
    assert [span.start for span in step.spans if span.lane == "network"] == pytest.approx([1.6, 2.05, 3.1])


def test_backward_and_an_exchange_slow_each_other_down() -> None:
    compute = Compute(1.0, 2.0, 0.5, (Filled(10, 0.5), Filled(20, 2.0)), 8)
    step = simulate_step(compute, 1, lambda size: size / 20, exchange_slowdown=1.5, compute_slowdown=1.25)
    # 0.5 s of exchange take 0.75 s, in which backward does 0.6 s: it ends 0.15 s later, and then there is no backward.
    assert ends(step) == pytest.approx([1.5, 2.25, 3.15, 4.15])
    assert (step.compute, step.exposed) == pytest.approx((3.65, 1.0))
    # A longer one is slower as long as there is backward: 1.5 s of that in 1.875, in which of its 4 s go by 1.25.
    compute = Compute(1.0, 2.0, 0.5, (Filled(10, 0.5),), 8)
    step = simulate_step(compute, 1, lambda size: 4.0, exchange_slowdown=1.5, compute_slowdown=1.25)
    assert ends(step) == pytest.approx([1.5, 1.5 + 1.875 + 4 - 1.25])


def ends(step: StepTimes) -> list[float]:
    """Of all exchanges, from when to when."""
    return [end for span in step.spans if span.lane == "network" for end in (span.start, span.end)]


def test_a_slow_loader_is_waited_for() -> None:
    step = simulate_step(COMPUTE, 1, lambda size: 0.0, loading=5.0)
    assert step.seconds == 5.0
    assert step.data_wait == pytest.approx(1.5)


@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(0, 2)), min_size=1, max_size=12),
    st.floats(0, 0.1),
    st.sampled_from([0.0, 1e-3, 0.05, 0.5]),
    st.integers(1, 4),
)
def test_bounds(buckets: list[tuple[int, float]], rate: float, wait: float, microbatches: int) -> None:
    """Never faster than computing alone or the network alone, never slower than one after the other."""
    compute = Compute(1.0, 2.0, 0.5, tuple(Filled(*bucket) for bucket in buckets), 8)
    step = simulate_step(compute, microbatches, lambda size: rate * size, wait=wait)
    network = rate * sum(size for size, _ in buckets)
    alone = 3.0 * microbatches + 0.5
    assert alone <= step.seconds + 1e-9
    assert network <= step.seconds + 1e-9
    assert step.seconds <= alone + network + len(buckets) * wait + 1e-9
    assert step.seconds == pytest.approx(step.compute + step.exposed + step.data_wait)
    for lane in ("device", "network"):  # nothing does two things at once
        spans = sorted((span.start, span.end) for span in step.spans if span.lane == lane)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_the_slowest_of_many() -> None:
    """Expected maxima of standard normal numbers (tables of order statistics)."""
    assert slowest_of(1) == 0
    assert slowest_of(2) == pytest.approx(0.564, abs=0.03)
    assert slowest_of(8) == pytest.approx(1.424, abs=0.03)
    assert slowest_of(100) == pytest.approx(2.508, abs=0.03)


def test_a_trace_has_every_span() -> None:
    step = simulate_step(COMPUTE, 2, lambda size: size / 20, loading=9.0)
    events = trace_events(step.spans)["traceEvents"]
    assert isinstance(events, list)
    assert len([event for event in events if event["ph"] == "X"]) == len(step.spans)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {
        "device",
        "network",
        "loader",
    }
