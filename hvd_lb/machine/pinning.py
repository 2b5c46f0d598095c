"""Which cores a rank runs on: those near its GPU, or an even share, so that no two ranks of a host move each other.

Linux says in /sys which CPUs are threads of one core, which share memory (a NUMA node), and which are near a device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvd_lb.machine.limits import allowed_cpus, cpu_list

_ROOT = Path("/")
#: Variables by which a user binds threads to cores.
_OWN = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")


def pin(
    local_rank: int, local_size: int, buses: Sequence[str], environment: Mapping[str, str] = os.environ
) -> str:
    """Bind this process, and all threads that it starts from now on, to its share of the cores; in words, which.

    It is one of `local_size` on its host. `buses` are PCI addresses of their GPUs, empty on CPUs. Nothing is done, and
    said, alone on a host, with fewer cores than ranks, and where somebody has bound this process or its threads already
    (taskset, srun, mpirun).
    """
    if local_size == 1 or not hasattr(os, "sched_setaffinity") or any(name in environment for name in _OWN):
        return ""
    here = frozenset(os.sched_getaffinity(0))
    if here != allowed_cpus():
        return ""
    near = [near_device(bus) for bus in buses] if len(buses) >= local_size else []
    mine = share(local_rank, local_size, cores(here), near)
    if mine:
        os.sched_setaffinity(0, mine)
    return f"on CPUs {in_words(mine)}" if mine else ""


def share(
    local_rank: int, local_size: int, there: Sequence[Sequence[int]], near: Sequence[frozenset[int]]
) -> list[int]:
    """The CPUs of one of `local_size` ranks; `there` are the CPUs of each core, neighbours beside each other.

    `near` are the CPUs near the GPU of each rank. Ranks whose GPUs are near the same CPUs share these evenly; all cores
    are shared where it is not known what is near, or that is too little. Empty where there are fewer cores than ranks.
    """
    everything = frozenset(cpu for core in there for cpu in core)
    of_ranks = [cpus & everything for cpus in near[:local_size]]
    cores_of = {cpus: [core for core in there if cpus.issuperset(core)] for cpus in of_ranks}
    if not of_ranks or any(len(cores_of[cpus]) < of_ranks.count(cpus) for cpus in cores_of):
        of_ranks, cores_of = [everything] * local_size, {everything: list(there)}
    mine = cores_of[of_ranks[local_rank]]
    count, place = of_ranks.count(of_ranks[local_rank]), of_ranks[:local_rank].count(of_ranks[local_rank])
    if len(mine) < count:
        return []
    return [
        cpu for core in mine[place * len(mine) // count : (place + 1) * len(mine) // count] for cpu in core
    ]


def cores(cpus: frozenset[int], root: Path = _ROOT) -> list[list[int]]:
    """These CPUs by cores: the threads of one beside each other, and the cores of a NUMA node."""
    nodes: dict[int, int] = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        nodes |= dict.fromkeys(cpu_list(folder / "cpulist"), int(folder.name.removeprefix("node")))
    found: dict[tuple[int, int], list[int]] = {}
    for cpu in sorted(cpus):
        siblings = cpu_list(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault((nodes.get(cpu, 0), min(siblings, default=cpu)), []).append(cpu)
    return [found[core] for core in sorted(found)]


def near_device(bus: str, root: Path = _ROOT) -> frozenset[int]:
    """The CPUs near a PCI device; empty where it is not known, or none is nearer than others."""
    return cpu_list(root / "sys/bus/pci/devices" / bus / "local_cpulist")


def in_words(cpus: Sequence[int]) -> str:
    """As Linux writes them: 0-3,8."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
