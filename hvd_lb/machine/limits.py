"""What this process may use of the machine where a container or a batch system limits it: control groups of Linux.

Version 2 has one tree of groups, version 1 one for each of CPU and memory. A group's limit holds for all below it. In a
container the tree begins at its own group, whatever /proc/self/cgroup says; so of the folders on the way those count
that are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs' worth of time (`docker run --cpus 1.5`, limits of Kubernetes); None without a limit."""
    quotas = [_quota(group) for group in _groups(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def allowed_cpus(root: Path = _ROOT) -> frozenset[int]:
    """The CPUs that this process's group may use, or that are online: a process with fewer was bound by somebody."""
    for group in _groups(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
            if cpus := cpu_list(group / name):
                return cpus
    return cpu_list(root / "sys/devices/system/cpu/online")


def cpu_list(path: Path) -> frozenset[int]:
    """The numbers in a file such as `0-3,8`; empty where there is none."""
    bounds = (part.partition("-")[::2] for part in (_text(path) or "").split(",") if part)
    return frozenset(cpu for first, last in bounds for cpu in range(int(first), int(last or first) + 1))


def memory_left(root: Path = _ROOT) -> int | None:
    """Bytes that may still be taken before a limit is met; None without one. Cached files do not count as taken."""
    left = [_left(group) for group in _groups(root, "memory")]
    return min((of for of in left if of is not None), default=None)


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that can still be taken, on this machine and by its limits."""
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    left = memory_left(root)
    return available if left is None else max(0, min(available, left))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups that have a say in this, of both versions."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        tree = root / "sys/fs/cgroup"
        if controllers:
            tree /= controller
        if not controllers or controller in controllers.split(","):
            group = tree / path.strip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(tree))


def _quota(group: Path) -> float | None:
    numbers = (_text(group / "cpu.max") or "").split()
    if not numbers:
        numbers = [_text(group / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    quota, period = map(_number, numbers)
    return quota / period if quota and period and quota > 0 else None


def _left(group: Path) -> int | None:
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, taken = _number(_text(group / limit)), _number(_text(group / usage))
        if most is not None and taken is not None:
            statistics = dict(line.split() for line in (_text(group / "memory.stat") or "").splitlines())
            return most - taken + int(statistics.get("inactive_file", 0))
    return None


def _number(text: str | None) -> int | None:
    """None for what is no number: "max", where there is no limit."""
    return int(text) if text and text.lstrip("-").isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
