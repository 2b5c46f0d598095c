"""What is wrong with a network: which host's link, or which link between two hosts, is slower than the others.

A link is compared with what the links of the other hosts do: with the median, over the hosts, of each one's best. So a
host that is slow with everyone spoils no more than its own part of the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

Pair = tuple[int, int]  # source and target
_SLOW = 0.5  # below this share of what others have
_LATE, _LATE_SECONDS = 5.0, 500e-6  # so many times the others' latency, and so much more


@dataclass(frozen=True)
class Blame:
    """`hosts` whose all links are affected, by "sends", "receives" or "both"; `pairs` are the rest."""

    hosts: dict[int, str]
    pairs: list[Pair]


def usual(rates: Mapping[Pair, float]) -> float:
    """What links do here: the median over the hosts of the best one of each; 0 without links."""
    best: dict[int, float] = {}
    for pair, rate in rates.items():
        for host in pair:
            best[host] = max(best.get(host, 0.0), rate)
    return median(best.values()) if best else 0.0


def slow_links(rates: Mapping[Pair, float]) -> set[Pair]:
    """Those below half of what is usual, and those that do not connect."""
    limit = _SLOW * usual(rates)
    return {pair for pair, rate in rates.items() if rate < limit or not rate}


def late_links(latencies: Mapping[Pair, float]) -> set[Pair]:
    """Those whose latency is far above the usual one, in both directions alike."""
    if not latencies:
        return set()
    speeds = {pair: 1 / seconds for pair, seconds in latencies.items()}
    typical = 1 / usual(speeds)
    late = {
        pair
        for pair, seconds in latencies.items()
        if seconds > _LATE * typical and seconds > typical + _LATE_SECONDS
    }
    return late | {(target, source) for source, target in late}


def blame(affected: set[Pair], hosts: int) -> Blame:
    """A host is to blame when all that it sends, or all that it receives, is affected; of two hosts none can be."""
    if hosts < 3:
        return Blame({}, sorted(affected))
    named: dict[int, str] = {}
    for host in range(hosts):
        others = [other for other in range(hosts) if other != host]
        sends = all((host, other) in affected for other in others)
        receives = all((other, host) in affected for other in others)
        if sends or receives:
            named[host] = "both" if sends and receives else "sends" if sends else "receives"
    if len(named) == hosts:  # nobody is left to compare with
        return Blame({}, sorted(affected))
    explained = {
        pair
        for pair in affected
        if named.get(pair[0]) in ("sends", "both") or named.get(pair[1]) in ("receives", "both")
    }
    return Blame(named, sorted(affected - explained))


def both_ways(pairs: list[Pair]) -> Iterator[tuple[Pair, bool]]:
    """Each link once, and whether it is affected in both directions."""
    there = set(pairs)
    for source, target in pairs:
        mirrored = (target, source) in there
        if not mirrored or source < target:
            yield (source, target), mirrored
