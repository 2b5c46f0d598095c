"""What a network report says in sentences: figures for a table, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hvd_lb.network.alpha_beta import fit
from hvd_lb.network.exchange import bus_bandwidth
from hvd_lb.network.judge import Pair, blame, both_ways, late_links, slow_links, usual
from hvd_lb.network.measure import HostPlace, NetworkReport

_MB = 1e6
_MOST_PAIRS = 8
_CHECK = "check its cable, switch port and driver"
_LOST = 0.001  # from this share of a stream on, what was sent again is worth a word


def allreduce_rows(report: NetworkReport) -> list[tuple[str, str, str]]:
    """Size, time and bus bandwidth of each allreduce."""
    return [
        (
            size_of(size),
            time_of(seconds),
            f"{bus_bandwidth(size, seconds, report.processes) / _MB:,.1f} MB/s",
        )
        for size, seconds in report.allreduces
    ]


def fit_of(report: NetworkReport) -> str | None:
    """The line through these times; None for less than two."""
    if len(report.allreduces) < 2:
        return None
    sizes, seconds = zip(*report.allreduces, strict=True)
    line = fit(sizes, seconds)
    slope = f" + size / {1 / line.beta / _MB:,.0f} MB/s" if line.beta else ""
    return f"time = {time_of(line.alpha)}{slope}, off by {100 * line.error:.0f} % (root mean square)"


def host_rows(report: NetworkReport) -> list[tuple[str, str, str, str, str]]:
    """Of each host its name, interface, what it sends to and receives from the others, and their distance."""
    rates, latencies = _rates(report), _latencies(report)
    rows = []
    for number, host in enumerate(report.hosts):
        sent = [rate for (source, _), rate in rates.items() if source == number]
        received = [rate for (_, target), rate in rates.items() if target == number]
        late = [seconds for (source, _), seconds in latencies.items() if source == number]
        rows.append((host.name, _interface(host), _span(sent), _span(received), _late(late)))
    return rows


def problems(report: NetworkReport) -> list[str]:
    """A line for each link of a host, or between two, that is not as the others; empty when all is well."""
    hosts, rates, latencies = report.hosts, _rates(report), _latencies(report)
    there = f"the others {usual(rates) / _MB:,.0f} MB/s"
    found = []
    loopback = [host.name for host in hosts if host.address.startswith("127.")] if len(hosts) > 1 else []
    for name in loopback:
        found.append(
            f"{name} has a loopback address for the others: see its /etc/hosts, or --network-interface"
        )
    slow = blame(slow_links(rates), len(hosts))
    for number, how in slow.hosts.items():
        of = [
            pair
            for pair in rates
            if (how != "receives" and pair[0] == number) or (how != "sends" and pair[1] == number)
        ]
        way = {"sends": "what it sends", "receives": "what it receives", "both": "both ways"}[how]
        rate = _span([rates[pair] for pair in of])
        found.append(
            f"the link of {hosts[number].name} is slow, {way}: {rate}, {there}{_why(report, of)}; {_CHECK}"
        )
    for (source, target), mirrored in _first(both_ways(slow.pairs)):
        arrow = "–" if mirrored else "→"
        back = "" if mirrored else f"back {_mb(rates[target, source])}, "
        found.append(
            f"the link {hosts[source].name} {arrow} {hosts[target].name} is slow: {_mb(rates[source, target])}, "
            f"{back}{there}{_why(report, [(source, target)])}; check the switches and routes between them"
        )
    late = blame(late_links(latencies), len(hosts))
    typical = _late(
        [1 / usual({pair: 1 / seconds for pair, seconds in latencies.items()})] if latencies else []
    )
    for number in late.hosts:
        its = [seconds for pair, seconds in latencies.items() if pair[0] == number]
        found.append(
            f"{hosts[number].name} is late: {_late(its)} to the others, between these {typical}; {_CHECK}"
        )
    for (source, target), _ in _first(both_ways(late.pairs)):
        seconds = _late([latencies[source, target]])
        found.append(
            f"the link {hosts[source].name} – {hosts[target].name} is late: {seconds}, the others {typical}; check the "
            "routes between them"
        )
    return found


def size_of(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def time_of(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.0f} µs"


def _rates(report: NetworkReport) -> dict[Pair, float]:
    return {(link.source, link.target): link.bytes_per_second or 0.0 for link in report.links}


def _latencies(report: NetworkReport) -> dict[Pair, float]:
    """In both directions, as it is half of a round."""
    there = {(source, target): seconds for source, target, seconds in report.latencies}
    return there | {(target, source): seconds for (source, target), seconds in there.items()}


def _first(pairs: Iterable[tuple[Pair, bool]]) -> list[tuple[Pair, bool]]:
    return list(pairs)[:_MOST_PAIRS]


def _why(report: NetworkReport, pairs: list[Pair]) -> str:
    """What else is known of such links: no connection, data sent again, an interface unlike those of the others."""
    links = [link for link in report.links if (link.source, link.target) in pairs]
    reasons = sorted({f"no connection ({link.problem})" for link in links if not link.bytes_per_second})
    if (lost := max((link.sent_again or 0.0 for link in links), default=0.0)) >= _LOST:
        reasons.append(f"up to {100 * lost:.1f} % of it was sent again")
    common = Counter(_interface(host) for host in report.hosts).most_common(1)[0][0]
    reasons += [
        f"{host.name} has {_interface(host)}, most have {common}"
        for host in (report.hosts[number] for number in sorted({end for pair in pairs for end in pair}))
        if _interface(host) != common
    ]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _interface(host: HostPlace) -> str:
    speed = f" {host.speed:,} Mbit/s" if host.speed else ""
    return f"{host.interface}{speed}, MTU {host.mtu}" if host.mtu else host.interface


def _span(rates: list[float]) -> str:
    if not rates:
        return "–"
    least, most = f"{min(rates) / _MB:,.0f}", f"{max(rates) / _MB:,.0f}"
    return f"{least} MB/s" if least == most else f"{least} to {most} MB/s"


def _mb(rate: float) -> str:
    return _span([rate])


def _late(latencies: list[float]) -> str:
    if not latencies:
        return "–"
    least, most = f"{1e6 * min(latencies):,.0f}", f"{1e6 * max(latencies):,.0f}"
    return f"{least} µs" if least == most else f"{least} to {most} µs"
