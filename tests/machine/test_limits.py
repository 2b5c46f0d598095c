"""Limits of containers: of cores and memory, in both versions of control groups, and what follows from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvd_lb.data.loading.shared_file import SharedFile
from hvd_lb.errors import UserError
from hvd_lb.machine import cpu
from hvd_lb.machine.limits import allowed_cpus, available_memory, cpu_quota, memory_left
from hvd_lb.machine.placement import choose_placement, loader_threads

GIB = 2**30


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A root folder with this /proc/self/cgroup, these files in /sys/fs/cgroup, and 8 GiB available."""
    contents = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    meminfo = f"MemTotal: 99999 kB\nMemAvailable:   {8 * GIB // 1024} kB\nHugePages_Total:       0\n"
    for name, text in {**contents, "proc/self/cgroup": groups, "proc/meminfo": meminfo}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_no_groups_no_limits(tmp_path: Path) -> None:
    for root in (tmp_path, machine(tmp_path / "a", "", {}), machine(tmp_path / "b", "0::/\n", {})):
        assert cpu_quota(root) is None
        assert memory_left(root) is None
    assert available_memory(tmp_path / "a") == 8 * GIB


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000 100000", 1.5), ("max 100000", None), ("20000 100000", 0.2), ("400000 50000", 8)],
)
def test_cores_of_a_container(quota: str, cores: float | None, tmp_path: Path) -> None:
    assert cpu_quota(machine(tmp_path, "0::/\n", {"cpu.max": quota + "\n"})) == cores


def test_cores_in_version_1(tmp_path: Path) -> None:
    """The container sees its own group as the top, and the path of the host."""
    groups = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"
    files = {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(machine(tmp_path / "limited", groups, files)) == 2.5
    files["cpu/cpu.cfs_quota_us"] = "-1\n"
    assert cpu_quota(machine(tmp_path / "free", groups, files)) is None


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    """Slurm limits the job, not the step or the task that runs in it."""
    files = {
        "system.slice/job_7/cpu.max": "200000 100000", "system.slice/job_7/step_0/cpu.max": "max 100000",
        "system.slice/cpu.max": "800000 100000", "other/cpu.max": "100000 100000",
        "system.slice/job_7/memory.max": f"{3 * GIB}", "system.slice/job_7/memory.current": f"{GIB}",
        "system.slice/memory.max": f"{9 * GIB}", "system.slice/memory.current": f"{8 * GIB}",
        "system.slice/job_7/step_0/memory.max": "max", "system.slice/job_7/step_0/memory.current": f"{GIB}",
    }  # fmt: skip
    root = machine(tmp_path, "0::/system.slice/job_7/step_0\n", files)
    assert cpu_quota(root) == 2
    assert memory_left(root) == available_memory(root) == GIB


@pytest.mark.parametrize("tight", ["", "a", "a/b"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_one_counts_wherever_it_is(version: int, tight: str, tmp_path: Path) -> None:
    groups = {1: "3:cpu,cpuacct:/a/b\n4:memory:/a/b\n", 2: "0::/a/b\n"}[version]
    files = {}
    for folder in ("", "a", "a/b"):
        cores, left = (1, 2) if folder == tight else (4, 5)
        if version == 1:
            files |= {
                f"cpu/{folder}/cpu.cfs_quota_us": f"{cores}00000", f"cpu/{folder}/cpu.cfs_period_us": "100000",
                f"memory/{folder}/memory.limit_in_bytes": f"{left * GIB}",
                f"memory/{folder}/memory.usage_in_bytes": f"{GIB}",
            }  # fmt: skip
        else:
            files |= {
                f"{folder}/cpu.max": f"{cores}00000 100000", f"{folder}/memory.max": f"{left * GIB}",
                f"{folder}/memory.current": f"{GIB}",
            }  # fmt: skip
    root = machine(tmp_path, groups, files)
    assert cpu_quota(root) == 1
    assert memory_left(root) == GIB


@pytest.mark.parametrize(
    ("limit", "taken", "cached", "left"),
    [
        (4 * GIB, GIB, 0, 3 * GIB),
        (4 * GIB, 4 * GIB, 3 * GIB, 3 * GIB),  # files that were read: the kernel lets go of them
        (4 * GIB, 5 * GIB, 0, 0),
        (100 * GIB, GIB, 0, 8 * GIB),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container(
    version: int, limit: int, taken: int, cached: int, left: int, tmp_path: Path
) -> None:
    names = {
        1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        2: ("memory.max", "memory.current", "memory.stat"),
    }[version]
    groups = {1: "4:memory:/docker/abc\n", 2: "0::/\n"}[version]
    texts = (f"{limit}\n", f"{taken}\n", f"anon 5\ninactive_file {cached}\nslab 3\n")
    assert available_memory(machine(tmp_path, groups, dict(zip(names, texts, strict=True)))) == left


def test_threads_and_processes_follow_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for quota, cores in ((None, 64), (3.2, 4), (0.5, 1), (100.0, 64)):
        monkeypatch.setattr(cpu, "cpu_quota", lambda quota=quota: quota)
        assert cpu.usable_cores() == cores
        assert choose_placement("cpu", gpus=1, processes=None, threads=None).threads == cores
        assert choose_placement("cpu", gpus=2, processes=None, threads=None).processes == min(2, cores)
        assert loader_threads(None, 1, cores, reproducible=True) == cores


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        (
            "0::/a/b\n",
            {"a/b/cpuset.cpus.effective": "0-2,8\n", "cpuset.cpus.effective": "0-15\n"},
            {0, 1, 2, 8},
        ),
        ("0::/a/b\n", {"a/cpuset.cpus.effective": "3\n", "a/b/cpu.max": "max 1"}, {3}),
        ("3:cpuset:/docker/x\n0::/\n", {"cpuset/cpuset.effective_cpus": "4-5\n"}, {4, 5}),
        ("0::/\n", {}, {0, 1, 2, 3}),
    ],
)
def test_cpus_that_groups_allow(groups: str, files: dict[str, str], cpus: set[int], tmp_path: Path) -> None:
    root = machine(tmp_path, groups, files)
    (root / "sys/devices/system/cpu").mkdir(parents=True)
    (root / "sys/devices/system/cpu/online").write_text("0-3\n")
    assert allowed_cpus(root) == cpus


def test_a_cache_in_memory_keeps_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_lb.data.loading.shared_file.available_memory", lambda: 5000)
    path = Path(f"/dev/shm/hvd-lb-test-{os.getpid()}.pixels")
    with pytest.raises(UserError, match="need 5,001 bytes and there are 5,000; leave --cache out"):
        SharedFile(path, 5001)
    assert not path.exists()
    SharedFile(path, 5000).unlink()


def test_a_process_hosts_whole_groups() -> None:
    assert choose_placement("cpu", gpus=7, processes=3, threads=1, group=3).processes == 3
    with pytest.raises(
        UserError, match=r"--processes 4 for 7 virtual workers, with .* --together 3: expected 1 to 3"
    ):
        choose_placement("cpu", gpus=7, processes=4, threads=1, group=3)
    assert choose_placement("cpu", gpus=2, processes=None, threads=1, group=2).processes == 1
