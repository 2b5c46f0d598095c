"""Who is to blame, on made-up rates: one slow host or link in a network, and noise that is none."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from hvd_lb.network.judge import Pair, blame, both_ways, late_links, slow_links, usual

FAST = 100.0


def network(hosts: int) -> dict[Pair, float]:
    return dict.fromkeys(permutations(range(hosts), 2), FAST)


def with_rate(rates: dict[Pair, float], rate: float, *pairs: Pair) -> dict[Pair, float]:
    return {**rates, **dict.fromkeys(pairs, rate)}


@pytest.mark.parametrize("hosts", [3, 4, 5, 32])
@pytest.mark.parametrize("how", ["sends", "receives", "both"])
def test_a_host_that_is_slow_with_all_is_named_and_no_link(hosts: int, how: str) -> None:
    pairs = [
        pair
        for pair in network(hosts)
        if (how != "receives" and pair[0] == 1) or (how != "sends" and pair[1] == 1)
    ]
    found = blame(slow_links(with_rate(network(hosts), 30.0, *pairs)), hosts)
    assert found.hosts == {1: how}
    assert found.pairs == []


@pytest.mark.parametrize("hosts", [3, 4, 5, 32])
def test_a_link_between_two_is_named_and_no_host(hosts: int) -> None:
    one = blame(slow_links(with_rate(network(hosts), 30.0, (0, 2))), hosts)
    assert (one.hosts, one.pairs) == ({}, [(0, 2)])
    both = blame(slow_links(with_rate(network(hosts), 30.0, (0, 2), (2, 0))), hosts)
    assert both.hosts == {}
    assert list(both_ways(both.pairs)) == [((0, 2), True)]
    assert list(both_ways(one.pairs)) == [((0, 2), False)]


def test_a_slow_host_and_a_slow_link_besides() -> None:
    rates = network(6)
    pairs = [pair for pair in rates if 5 in pair]
    found = blame(slow_links(with_rate(rates, 10.0, *pairs, (0, 1))), 6)
    assert (found.hosts, found.pairs) == ({5: "both"}, [(0, 1)])


def test_two_slow_hosts_of_five() -> None:
    rates = network(5)
    found = blame(slow_links(with_rate(rates, 10.0, *(pair for pair in rates if {3, 4} & {*pair}))), 5)
    assert (found.hosts, found.pairs) == ({3: "both", 4: "both"}, [])


def test_of_two_hosts_the_slow_direction_is_named() -> None:
    found = blame(slow_links({(0, 1): 100.0, (1, 0): 20.0}), 2)
    assert (found.hosts, found.pairs) == ({}, [(1, 0)])
    assert slow_links({(0, 1): 100.0, (1, 0): 80.0}) == set()


def test_a_link_that_does_not_connect() -> None:
    assert slow_links(with_rate(network(4), 0.0, (1, 2))) == {(1, 2)}
    assert slow_links({(0, 1): 0.0, (1, 0): 0.0}) == {(0, 1), (1, 0)}


def test_noise_of_a_third_is_nothing() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        rates = {pair: FAST * random.uniform(0.66, 1.0) for pair in network(8)}
        assert slow_links(rates) == set()


def test_what_is_usual_is_not_what_a_slow_host_does() -> None:
    rates = network(3)
    assert usual(with_rate(rates, 1.0, *(pair for pair in rates if 2 in pair))) == FAST
    assert usual({}) == 0.0


def test_late_links_are_late_both_ways_and_small_differences_are_none() -> None:
    usual_latency = 50e-6
    there = {(0, 1): usual_latency, (0, 2): usual_latency, (1, 2): 2e-3}
    assert late_links(there) == {(1, 2), (2, 1)}
    assert late_links({**there, (1, 2): 4 * usual_latency}) == set()
    assert late_links(dict.fromkeys(there, 1e-06) | {(1, 2): 100e-6}) == set()  # of microseconds nobody dies
    assert late_links({}) == set()
    assert blame(late_links({(0, 1): 5e-5, (0, 2): 9e-3, (1, 2): 9e-3}), 3).hosts == {2: "both"}
