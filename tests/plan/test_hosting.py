"""Which virtual workers a process hosts: the formula of docs/design.md, for every p and k."""

from __future__ import annotations

import pytest

from hvd_lb.plan.hosting import hosted


@pytest.mark.parametrize("workers", [1, 3, 4, 8, 11])
@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 13])
def test_process_r_hosts_workers_from_floor_rk_over_p(processes: int, workers: int) -> None:
    for rank in range(processes):
        first, end = rank * workers // processes, (rank + 1) * workers // processes
        assert hosted(rank, processes, workers) == range(first, end)


def test_groups_stay_whole() -> None:
    assert [list(hosted(rank, 2, 7, group=2)) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [list(hosted(rank, 3, 7, group=3)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_process_that_is_none(rank: int) -> None:
    with pytest.raises(ValueError, match=f"process {rank} of 3"):
        hosted(rank, 3, 8)
