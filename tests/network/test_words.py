"""The lines that a user reads, on made-up reports."""

from __future__ import annotations

from typing import Any

from hvd_lb.network.measure import HostPlace, Link, NetworkReport
from hvd_lb.network.words import allreduce_rows, fit_of, host_rows, problems


def report(rates: dict[tuple[int, int], float], count: int = 3, **more: Any) -> NetworkReport:
    """All links 1,000 MB/s and 50 µs but for `rates` (MB/s)."""
    places = [
        HostPlace(name=f"h{n + 1}", interface="eth0", address=f"10.0.0.{n + 1}", speed=10_000, mtu=1500)
        for n in range(count)
    ]
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    links = [Link(source=a, target=b, bytes_per_second=1e6 * rates.get((a, b), 1000.0)) for a, b in pairs]
    latencies = [(a, b, 50e-6) for a, b in pairs if a < b]
    parts = {"hosts": places, "links": links, "latencies": latencies} | more
    return NetworkReport(
        processes=count, device="cpu", allreduces=[(1 << 20, 2e-3), (1 << 26, 66e-3)], **parts
    )


def test_nothing_is_wrong() -> None:
    good = report({})
    assert problems(good) == []
    assert host_rows(good)[0] == ("h1", "eth0 10,000 Mbit/s, MTU 1500", "1,000 MB/s", "1,000 MB/s", "50 µs")
    assert allreduce_rows(good)[0] == ("1 MiB", "2.0 ms", "699.1 MB/s")
    assert str(fit_of(good)).startswith("time = 984 µs + size / 1,032 MB/s, off by 0 %")


def test_a_slow_host_is_named_with_what_is_known_of_it() -> None:
    slow = report({(2, 0): 12.0, (2, 1): 11.0})
    hosts = [*slow.hosts[:2], slow.hosts[2].model_copy(update={"interface": "eth1", "speed": 100})]
    links = [
        link.model_copy(update={"sent_again": 0.25}) if link.source == 2 else link for link in slow.links
    ]
    (line,) = problems(slow.model_copy(update={"hosts": hosts, "links": links}))
    assert line == (
        "the link of h3 is slow, what it sends: 11 to 12 MB/s, the others 1,000 MB/s (up to 25.0 % of it was sent "
        "again; h3 has eth1 100 Mbit/s, MTU 1500, most have eth0 10,000 Mbit/s, MTU 1500); check its cable, switch "
        "port and driver"
    )


def test_a_slow_link_is_named_with_its_direction() -> None:
    (one,) = problems(report({(0, 2): 12.0}))
    assert one == (
        "the link h1 → h3 is slow: 12 MB/s, back 1,000 MB/s, the others 1,000 MB/s; check the switches and routes "
        "between them"
    )
    (both,) = problems(report({(0, 2): 12.0, (2, 0): 12.0}))
    assert both.startswith("the link h1 – h3 is slow: 12 MB/s, the others 1,000 MB/s;")


def test_a_link_without_connection() -> None:
    links = [
        link.model_copy(update={"bytes_per_second": None, "problem": "timed out"})
        if (link.source, link.target) == (0, 1)
        else link
        for link in report({}).links
    ]
    (line,) = problems(report({}, links=links))
    assert line.startswith("the link h1 → h2 is slow: 0 MB/s, back 1,000 MB/s")
    assert "(no connection (timed out))" in line


def test_late_hosts_and_links() -> None:
    (host,) = problems(report({}, latencies=[(0, 1, 50e-6), (0, 2, 3e-3), (1, 2, 4e-3)]))
    assert host.startswith("h3 is late: 3,000 to 4,000 µs to the others, between these 50 µs;")
    (link,) = problems(report({}, latencies=[(0, 1, 50e-6), (0, 2, 50e-6), (1, 2, 4e-3)]))
    assert link.startswith("the link h2 – h3 is late: 4,000 µs, the others 50 µs;")


def test_a_loopback_address_is_wrong_where_there_are_several_hosts() -> None:
    places = report({}).hosts
    wrong = [places[0].model_copy(update={"address": "127.0.1.1"}), *places[1:]]
    assert problems(report({}, hosts=wrong)) == [
        "h1 has a loopback address for the others: see its /etc/hosts, or --network-interface"
    ]


def test_of_very_many_slow_links_the_first_are_told() -> None:
    rates = {(a, b): 1.0 for a in range(5) for b in range(5, 10)}
    assert 1 <= len(problems(report(rates, count=10))) <= 8
