"""The network of a job as its processes see it: allreduces between all, and each link between two hosts.

All processes measure together. The links are a tournament: in each round every host has one partner, so that n hosts
need n − 1 rounds of half a second or so. A link that seems slow is measured once more, with nothing else under way.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from hvd_lb.network.exchange import time_allreduces, time_beside_computing
from hvd_lb.network.judge import slow_links
from hvd_lb.network.links import Listener, Measured, Peer, measure_first, measure_second
from hvd_lb.network.tournament import rounds
from hvd_lb.world import World
from hvd_lb.world.gather import gather_bytes

_MOST_AGAIN = 64  # where more links seem slow, all of the network is


class HostPlace(BaseModel):
    """A host and the interface by which it reaches the others; `speed` (Mbit/s) and `mtu` as its driver says them."""

    model_config = ConfigDict(frozen=True)

    name: str
    interface: str
    address: str
    speed: int | None
    mtu: int | None


class Link(BaseModel):
    """What arrives at host `target` from host `source`, numbers of the list of hosts; None: there is no connection."""

    source: int
    target: int
    bytes_per_second: float | None
    sent_again: float | None = None  #: the share of it that TCP sent again
    problem: str = ""


class NetworkReport(BaseModel):
    """Measured: `allreduces` are (bytes, seconds), `latencies` the seconds from each host to another, and back.

    On CPUs an exchange and computing take cores from each other: how many times as long each then takes.
    """

    processes: int
    device: str
    hosts: list[HostPlace]
    allreduces: list[tuple[int, float]]
    links: list[Link]
    latencies: list[tuple[int, int, float]]
    exchange_slowdown: float = 1.0
    compute_slowdown: float = 1.0
    cycle_ms: float = 0.0  #: of the engine in a run; here it hardly waits


def measure(world: World, device: torch.device, host: str, interface: str) -> NetworkReport:
    """Collective; `host` is the name of this process's, `interface` the one it uses. The same report on all."""
    allreduces = time_allreduces(world, device) if world.size > 1 else []
    beside = time_beside_computing(world, allreduces) if allreduces and device.type == "cpu" else (1.0, 1.0)
    address, speed, mtu = _interface(interface)
    place = HostPlace(name=host, interface=interface, address=address, speed=speed, mtu=mtu)
    listener = Listener(address) if world.local_rank == 0 else None
    try:
        here = {"place": place.model_dump(), "peer": vars(listener.peer) if listener else None}
        said = [json.loads(text) for text in gather_bytes(world, json.dumps(here).encode(), "places")]
        leaders = [rank for rank, one in enumerate(said) if one["peer"]]
        hosts = [HostPlace(**said[rank]["place"]) for rank in leaders]
        peers = [Peer(**said[rank]["peer"]) for rank in leaders]
        own = leaders.index(world.rank) if listener else None
        found: dict[tuple[int, int], Measured] = {}
        for number, pairs in enumerate(rounds(len(hosts))):
            found |= _round(world, pairs, own, peers, listener, f"round.{number}")
        again = {(min(pair), max(pair)) for pair in slow_links(_rates(found))}
        for number, pair in enumerate(sorted(again) if len(again) <= _MOST_AGAIN else ()):
            second = _round(world, [pair], own, peers, listener, f"again.{number}")
            found |= {sides: _better(found[sides], one) for sides, one in second.items()}
    finally:
        if listener:
            listener.close()
    return NetworkReport(
        processes=world.size,
        device=device.type,
        hosts=hosts,
        allreduces=allreduces,
        exchange_slowdown=beside[0],
        compute_slowdown=beside[1],
        links=[
            Link(
                source=source,
                target=target,
                bytes_per_second=one.bytes_per_second,
                # What was sent again, the sender knows.
                sent_again=found[target, source].sent_again,
                problem=one.problem,
            )
            for (source, target), one in sorted(found.items())
        ],
        latencies=[
            (target, source, one.latency) for (source, target), one in sorted(found.items()) if one.latency
        ],
    )


def _round(
    world: World,
    pairs: Sequence[tuple[int, int]],
    own: int | None,
    peers: Sequence[Peer],
    listener: Listener | None,
    name: str,
) -> dict[tuple[int, int], Measured]:
    """What each host of these pairs has measured, by (partner, host); collective."""
    mine: dict[str, Any] = {}
    world.barrier()
    for first, second in pairs:
        if listener and own in (first, second):
            other = second if own == first else first
            measured = (measure_first if own == first else measure_second)(listener, peers[other])
            mine = {"partner": other, "host": own, "measured": vars(measured)}
    said = map(json.loads, gather_bytes(world, json.dumps(mine).encode(), name))
    return {(one["partner"], one["host"]): Measured(**one["measured"]) for one in said if one}


def _rates(found: Mapping[tuple[int, int], Measured]) -> dict[tuple[int, int], float]:
    return {sides: one.bytes_per_second or 0.0 for sides, one in found.items()}


def _better(one: Measured, other: Measured) -> Measured:
    return max(one, other, key=lambda of: of.bytes_per_second or 0.0)


def _interface(name: str) -> tuple[str, int | None, int | None]:
    """Its IPv4 address, speed in Mbit/s and MTU in bytes; OSError where it has no address."""
    for entry in psutil.net_if_addrs().get(name, ()):
        if entry.family == socket.AF_INET:
            return entry.address, _said(name, "speed"), _said(name, "mtu")
    raise OSError(f"interface {name} has no IPv4 address")


def _said(interface: str, what: str) -> int | None:
    try:
        number = int(Path("/sys/class/net", interface, what).read_text("ascii"))
    except (OSError, ValueError):  # virtual ones have no speed
        return None
    return number if number > 0 else None
