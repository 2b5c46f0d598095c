"""Which rank is where, and what it is told of that: pure functions of the hosts, which are filled in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Hosts = Sequence[tuple[str, int]]
"""Names and numbers of ranks."""


def ranks_by_host(hosts: Hosts) -> dict[str, range]:
    found, first = {}, 0
    for name, slots in hosts:
        found[name] = range(first, first + slots)
        first += slots
    return found


def rank_environments(hosts: Hosts, host: str) -> dict[int, dict[str, str]]:
    """What Horovod reads of each rank of a host: its number of all, of its host, and among those with that number."""
    places = ranks_by_host(hosts)
    found = {}
    for local_rank, rank in enumerate(places[host]):
        across = [name for name, ranks in places.items() if len(ranks) > local_rank]
        found[rank] = {
            "HOROVOD_HOSTNAME": host,
            "HOROVOD_RANK": str(rank),
            "HOROVOD_SIZE": str(sum(slots for _, slots in hosts)),
            "HOROVOD_LOCAL_RANK": str(local_rank),
            "HOROVOD_LOCAL_SIZE": str(len(places[host])),
            "HOROVOD_CROSS_RANK": str(across.index(host)),
            "HOROVOD_CROSS_SIZE": str(len(across)),
        }
    return found


def name_ranks(hosts: Hosts, ranks: Collection[int], most: int = 8) -> str:
    """`h17 ranks 136…138, h18 rank 144`: `ranks` by host, those of the first `most` hosts."""
    named = []
    for host, there in ranks_by_host(hosts).items():
        if found := [rank for rank in there if rank in ranks]:
            named.append(f"{host} {numbered(found)}")
    more = f" and {len(named) - most} more hosts" if len(named) > most else ""
    return ", ".join(named[:most]) + more


def numbered(ranks: Sequence[int]) -> str:
    """`ranks 3, 5…7` of ascending numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}…{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
