"""Shares of a host's cores, on pretended hosts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lb.machine import pinning
from hvd_lb.machine.pinning import cores, in_words, near_device, pin, share


def host(root: Path, *, nodes: int = 2, cores_of_node: int = 4, gpus: dict[str, str] | None = None) -> Path:
    """Two threads a core: CPU i and i + n, as Intel and AMD number them. `gpus`: local_cpulist by PCI address."""
    count = nodes * cores_of_node
    texts = {}
    for node in range(nodes):
        first = node * cores_of_node
        last = first + cores_of_node - 1
        texts[f"devices/system/node/node{node}/cpulist"] = f"{first}-{last},{first + count}-{last + count}"
    for cpu in range(2 * count):
        siblings = f"{cpu % count},{cpu % count + count}"
        texts[f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
    for bus, cpus in (gpus or {}).items():
        texts[f"bus/pci/devices/{bus}/local_cpulist"] = cpus
    for name, text in texts.items():
        (root / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys" / name).write_text(text + "\n")
    return root


GPUS = {"0000:17:00.0": "0-3,8-11", "0000:31:00.0": "0-3,8-11", "0000:b1:00.0": "4-7,12-15"}


def test_threads_of_a_core_and_cores_of_a_node_are_beside_each_other(tmp_path: Path) -> None:
    there = cores(frozenset(range(16)), host(tmp_path))
    assert there == [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]]
    assert cores(frozenset({1, 9, 4}), tmp_path) == [[1, 9], [4]]  # what a group allows
    assert cores(frozenset({3, 1}), tmp_path / "none") == [[1], [3]]


def test_ranks_run_near_their_gpus(tmp_path: Path) -> None:
    there = cores(frozenset(range(16)), host(tmp_path, gpus=GPUS))
    near = [near_device(bus, tmp_path) for bus in GPUS]
    shares = [share(rank, 3, there, near) for rank in range(3)]
    assert list(map(in_words, shares)) == ["0-1,8-9", "2-3,10-11", "4-7,12-15"]


def test_without_gpus_the_shares_are_even_and_of_one_node_where_they_can_be(tmp_path: Path) -> None:
    there = cores(frozenset(range(16)), host(tmp_path))
    assert [in_words(share(rank, 2, there, [])) for rank in range(2)] == ["0-3,8-11", "4-7,12-15"]
    assert [len(share(rank, 3, there, [])) for rank in range(3)] == [4, 6, 6]
    assert share(0, 9, there, []) == []


@pytest.mark.parametrize(
    "near",
    [
        [frozenset({0, 8}), frozenset({0, 8})],  # one core for two
        [frozenset({0, 8}), frozenset()],  # not known of one
        [frozenset({90}), frozenset({91})],  # not allowed by the group
    ],
)
def test_where_too_little_is_near_all_cores_are_shared(tmp_path: Path, near: list[frozenset[int]]) -> None:
    there = cores(frozenset(range(16)), host(tmp_path))
    assert [in_words(share(rank, 2, there, near)) for rank in range(2)] == ["0-3,8-11", "4-7,12-15"]


@given(st.integers(1, 40), st.integers(1, 20), st.lists(st.integers(0, 3), max_size=20))
def test_no_two_ranks_share_a_core_and_each_has_one(count: int, local_size: int, nodes: list[int]) -> None:
    there = [[cpu, cpu + 100] for cpu in range(count)]
    of_node = [frozenset(cpu for core in there[node::4] for cpu in core) for node in range(4)]
    near = [of_node[node] for node in nodes] if len(nodes) >= local_size else []
    shares = [share(rank, local_size, there, near) for rank in range(local_size)]
    given_out = [cpu for cpus in shares for cpu in cpus]
    assert len(set(given_out)) == len(given_out)
    assert all(shares) if count >= local_size else not given_out


def test_words() -> None:
    assert in_words([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What this process would be bound to, on a host of four cores."""
    found: list[list[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: found.append(cpus), raising=False)
    monkeypatch.setattr(pinning, "allowed_cpus", lambda: frozenset(range(4)))
    monkeypatch.setattr(pinning, "cores", lambda cpus: [[cpu] for cpu in sorted(cpus)])
    return found


def test_a_rank_is_bound_to_its_share(bound: list[list[int]]) -> None:
    assert pin(1, 2, [], {}) == "on CPUs 2-3"
    assert bound == [[2, 3]]


def test_a_binding_of_the_users_stays(bound: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pin(0, 2, [], {"OMP_PLACES": "cores"}) == ""
    assert pin(0, 1, [], {}) == ""  # alone on its host
    assert pin(0, 5, [], {}) == ""  # more ranks than cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})  # taskset
    assert pin(0, 2, [], {}) == ""
    assert bound == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_threads_that_are_started_later_are_bound_as_well() -> None:
    program = (
        "import os, threading; from hvd_lb.machine.pinning import pin; said = pin(1, 2, []); import torch;"
        "seen = []; thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)));"
        "thread.start(); thread.join(); print(said, seen[0] == os.sched_getaffinity(0), len(seen[0]))"
    )
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_PL", "GOMP", "KMP"))
    }
    said = subprocess.run(
        [sys.executable, "-c", program], env=own, capture_output=True, text=True, check=True
    )
    if said.stdout.startswith("on CPUs"):  # not where this test itself is bound
        assert " True " in said.stdout
