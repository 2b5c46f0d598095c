"""Links and allreduces measured by threads that stand for hosts, over this machine's loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from together import Together, together

from hvd_lb.network import exchange, links, measure, words
from hvd_lb.network.links import Listener, Measured, Peer, measure_first, measure_second
from hvd_lb.network.measure import NetworkReport


@pytest.fixture(autouse=True)
def _in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SECONDS", 0.05)
    monkeypatch.setattr(links, "_TIMEOUT", 2.0)
    monkeypatch.setattr(exchange, "_SECONDS", 0.02)


def between(first: Callable[[], Measured], second: Callable[[], Measured]) -> tuple[Measured, Measured]:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        return one.result(60), two.result(60)


def test_both_sides_of_a_link() -> None:
    a, b = Listener("127.0.0.1"), Listener("127.0.0.1")
    first, second = between(lambda: measure_first(a, b.peer), lambda: measure_second(b, a.peer))
    for side in (first, second):
        assert side.problem == ""
        assert side.bytes_per_second
        assert side.bytes_per_second > 1e6
        assert side.sent_again is not None
        assert 0 <= side.sent_again < 0.5
    assert first.latency
    assert 0 < first.latency < 1
    assert second.latency is None
    a.close()
    b.close()


def test_a_direction_that_is_closed_is_told_and_the_other_is_measured() -> None:
    a, b = Listener("127.0.0.1"), Listener("127.0.0.1")
    nobody = socket.create_server(("127.0.0.1", 0))
    port = nobody.getsockname()[1]
    nobody.close()
    first, second = between(
        lambda: measure_first(a, Peer("127.0.0.1", port, "00" * 16)), lambda: measure_second(b, a.peer)
    )
    assert "refused" in first.problem
    assert first.bytes_per_second
    assert second.bytes_per_second is None
    assert second.problem == "timed out"
    a.close()
    b.close()


def test_who_does_not_know_the_token_is_turned_away() -> None:
    listener = Listener("127.0.0.1")
    accepted: list[socket.socket] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(10)))
    thread.start()
    place = (listener.peer.address, listener.peer.port)
    with socket.create_connection(place) as stranger:
        stranger.sendall(b"x" * 16)
        assert stranger.recv(1) == b""
    with socket.create_connection(place) as friend:
        friend.sendall(bytes.fromhex(listener.peer.token))
        thread.join(10)
        (connection,) = accepted
        connection.close()
    listener.close()


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_all_hosts_measure_together_and_have_one_report(hosts: int) -> None:
    def run(world: Together) -> NetworkReport:
        world.local_rank = 0
        return measure.measure(world, torch.device("cpu"), f"h{world.rank}", "lo")

    first, *others = together(hosts, run)
    assert all(other == first for other in others)
    assert [host.name for host in first.hosts] == [f"h{number}" for number in range(hosts)]
    assert {(link.source, link.target) for link in first.links} == {
        (a, b) for a in range(hosts) for b in range(hosts) if a != b
    }
    assert all(link.bytes_per_second and link.sent_again is not None for link in first.links)
    assert len(first.latencies) == hosts * (hosts - 1) // 2
    assert [size for size, _ in first.allreduces] == list(exchange.SIZES)
    assert NetworkReport.model_validate(json.loads(first.model_dump_json())) == first
    assert len(words.host_rows(first)) == hosts
    assert len(words.allreduce_rows(first)) == len(exchange.SIZES)
    assert "root mean square" in str(words.fit_of(first))


def test_processes_of_one_host_have_no_links() -> None:
    report = together(2, lambda world: measure.measure(world, torch.device("cpu"), "here", "lo"))[1]
    assert [host.name for host in report.hosts] == ["here"]
    assert report.links == []
    assert report.allreduces
    assert words.problems(report) == []


def test_a_link_that_seems_slow_is_measured_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was noise: the second time the link is as the others, and that counts."""
    calls: list[tuple[str, list[tuple[int, int]]]] = []

    def rounds_of(
        world: Together, pairs: list[tuple[int, int]], own: object, peers: object, of: object, name: str
    ):  # type: ignore[no-untyped-def]
        if world.rank == 0:
            calls.append((name, list(pairs)))
        rate = 1e6 if name == "round.1" else 1e8
        return {sides: Measured(rate, 0.0, 1e-5) for a, b in pairs for sides in ((a, b), (b, a))}

    monkeypatch.setattr(measure, "_round", rounds_of)

    def run(world: Together) -> NetworkReport:
        world.local_rank = 0
        return measure.measure(world, torch.device("cpu"), f"h{world.rank}", "lo")

    report = together(4, run)[0]
    slow = dict(calls)["round.1"]
    assert [(name, pairs) for name, pairs in calls if name.startswith("again")] == [
        (f"again.{number}", [pair]) for number, pair in enumerate(sorted(slow))
    ]
    assert {link.bytes_per_second for link in report.links} == {1e8}


def test_sizes_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LONGEST", 0.0)
    found = together(2, lambda world: exchange.time_allreduces(world, torch.device("cpu")))
    assert [[size for size, _ in one] for one in found] == [[exchange.SIZES[0]]] * 2


def test_bus_bandwidth_is_that_of_a_ring() -> None:
    assert exchange.bus_bandwidth(8_000_000, 2.0, 4) == 2 * 3 / 4 * 4_000_000
    assert exchange.bus_bandwidth(10, 1.0, 1) == 0
