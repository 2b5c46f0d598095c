"""The closed forms count what the messages do, and the messages make the sum."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from hvd_lb.forecast import messages
from hvd_lb.forecast.collectives import (
    ALGORITHMS,
    Hierarchy,
    Link,
    binary_blocks,
    chain,
    halving_doubling,
    ring,
    through_host,
)

PROCESSES = range(1, 65)


def arrays(servers: int, elements: int) -> list[np.ndarray]:
    return list(np.random.default_rng(servers).integers(-1000, 1000, (servers, elements)))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("servers", PROCESSES)
def test_steps_and_bytes_are_those_of_the_messages_and_the_result_is_the_sum(name: str, servers: int) -> None:
    elements = 64 * servers  # every part that an algorithm cuts is whole
    mine = arrays(servers, elements)
    total = sum(mine)
    counted = messages.run(messages.ALGORITHMS[name](servers, elements), mine)
    for array in mine:
        np.testing.assert_array_equal(array, total)
    assert astuple(counted) == pytest.approx(astuple(ALGORITHMS[name](servers, 8 * elements)), rel=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("elements", [1, 2, 7, 101])
def test_sums_of_lengths_that_cannot_be_divided(name: str, elements: int) -> None:
    for servers in (1, 2, 3, 5, 11, 44, 63, 64):
        mine = arrays(servers, elements)
        total = sum(mine)
        messages.run(messages.ALGORITHMS[name](servers, elements), mine)
        assert all((array == total).all() for array in mine)


@pytest.mark.parametrize("servers", PROCESSES)
def test_what_the_paper_says_of_steps_and_bytes(servers: int) -> None:
    """Section 4: both move 2 (p − 1) / p · b bytes; 2 (p − 1) and 2 log2 p steps; two more with binary blocks."""
    size = 1e8
    around, halved = ring(servers, size), halving_doubling(servers, size)
    assert around.steps == 2 * (servers - 1)
    assert around.sent == pytest.approx(2 * (servers - 1) / servers * size)
    largest = binary_blocks(servers)[0]
    assert sum(binary_blocks(servers)) == servers
    if largest == servers:
        assert halved.steps == 2 * np.log2(servers)
        assert halved.sent == pytest.approx(around.sent)
    else:
        assert halved.steps == 2 * np.log2(largest) + 2
        assert halved.sent <= 2 * size


def test_blocks_of_44_servers() -> None:
    assert binary_blocks(44) == [32, 8, 4]
    # 32 servers halve five times; 8 of them hand b / 8 on, before that 4 of them b / 4, in place of b / 16.
    assert halving_doubling(44, 1.0).wire == pytest.approx(2 * (31 / 32 + 1 / 8 + 1 / 4 - 1 / 16))


@pytest.mark.parametrize("gpus", range(1, 17))
def test_the_phases_inside_a_server(gpus: int) -> None:
    elements = 16 * gpus
    mine = arrays(gpus, elements)
    total = sum(mine)
    counted = messages.run(messages.chain(gpus, elements), mine)
    assert all((array == total).all() for array in mine)
    assert astuple(counted) == pytest.approx(astuple(chain(gpus, 8 * elements)))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(("servers", "gpus"), [(1, 8), (3, 8), (4, 2), (5, 1), (11, 4)])
def test_three_phases_add_up_all_gpus_and_cost_the_sum_of_their_steps(
    name: str, servers: int, gpus: int
) -> None:
    elements = 64 * servers * gpus
    mine = arrays(servers * gpus, elements)
    total = sum(mine)
    up, between, down = (
        messages.run(steps, mine) for steps in messages.three_phases(name, servers, gpus, elements)
    )
    assert all((array == total).all() for array in mine)
    inside, outside = Link(1e-5, 1e-11, 1e-12), Link(5e-5, 1e-9, 1e-10)
    seconds = up.seconds(inside) + between.seconds(outside) + down.seconds(inside)
    model = Hierarchy(gpus, outside, inside)
    assert model.seconds(name, servers * gpus, 8 * elements) == pytest.approx(seconds)


def test_small_buffers_go_through_the_host() -> None:
    """Below 256 KB every GPU copies to the host and back (section 4)."""
    free, slow = Link(0, 0), Link(1.0, 0)
    model = Hierarchy(8, free, free, host=slow)
    assert model.seconds("ring", 8, (256 << 10) - 1) == 2
    assert model.seconds("ring", 8, 256 << 10) == 0
    assert through_host(8, 10) == through_host(8, 10.0)
    assert through_host(8, 10).added == 70
    assert through_host(1, 10).steps == 0
