"""What is audited, by whom: drawn evenly, never by its own process; how long a process that is wrong stays hidden."""

from __future__ import annotations

from collections import Counter

import pytest

from hvd_lb.audit.draw import Draw, draw, expected_steps
from hvd_lb.audit.votes import Judgement, judge
from hvd_lb.plan.hosting import hosted


def draws(steps: int, rate: float = 1.0, workers: int = 8, group: int = 1, hosts: str = "0123") -> list[Draw]:
    found = [
        draw(7, step, rate, 4 * workers, workers, group, [int(host) for host in hosts])
        for step in range(steps)
    ]
    return [drawn for drawn in found if drawn]


def test_each_worker_and_each_process_alike() -> None:
    found = draws(8000)
    assert len(found) == 8000
    workers = Counter(drawn.workers[0] for drawn in found)
    assert len(workers) == 8
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in workers.values())
    pairs = Counter((drawn.owner, drawn.auditor) for drawn in found)
    assert len(pairs) == 12  # none with itself
    assert all(abs(count - 8000 / 12) < 5 * (8000 / 12) ** 0.5 for count in pairs.values())
    assert all(drawn.workers[0] in hosted(drawn.owner, 4, 8) for drawn in found)


def test_who_audits_does_not_follow_from_what_is_audited() -> None:
    """Eight workers, and four processes that do not host one: all of 32 pairs come."""
    pairs = Counter((drawn.workers[0], drawn.auditor) for drawn in draws(8000, hosts="01234"))
    assert len(pairs) == 32
    assert all(abs(count - 250) < 5 * 250**0.5 for count in pairs.values())


def test_as_often_as_is_asked_for() -> None:
    assert abs(len(draws(10_000, rate=0.1)) - 1000) < 5 * 1000**0.5
    assert draws(1000, rate=0.0) == []
    assert draws(1000, hosts="0") == []


def test_by_another_host_where_there_is_one() -> None:
    assert all("0011"[drawn.owner] != "0011"[drawn.auditor] for drawn in draws(200, hosts="0011"))
    assert all(drawn.owner != drawn.auditor for drawn in draws(200, hosts="0000"))


def test_workers_that_are_computed_together_are_audited_together() -> None:
    found = draws(200, workers=7, group=3)
    assert {tuple(drawn.workers) for drawn in found} == {(0, 1, 2), (3, 4, 5), (6,)}
    for drawn in draws(200, workers=8, group=3, hosts="01"):
        assert set(drawn.workers) <= set(hosted(drawn.owner, 2, 8, 3))


def test_workers_without_images_are_not_drawn() -> None:
    found = {draw(7, step, 1.0, 3, 8, 1, [0, 1]).workers[0] for step in range(200)}  # type: ignore[union-attr]
    assert found == {worker for worker in range(8) if len(hosted(worker, 8, 3))}
    assert len(found) == 3


@pytest.mark.parametrize(("processes", "rate"), [(4, 1.0), (8, 0.5), (3, 1.0)])
def test_how_long_a_process_stays_hidden_that_is_always_wrong(processes: int, rate: float) -> None:
    """Counted over many runs of the very draws, each with another process that is wrong; ± 5 standard errors."""
    runs, total = 600, 0
    for seed in range(runs):
        wrong, step = seed % processes, 0
        while True:
            drawn = draw(seed, step, rate, 96, 24, 1, list(range(processes)))
            step += 1
            if drawn and wrong in (drawn.owner, drawn.auditor):
                break
        total += step
    expected = expected_steps(rate, processes)
    assert abs(total / runs - expected) < 5 * expected / runs**0.5


@pytest.mark.parametrize(
    ("votes", "truth", "liars"),
    [
        ([(0, "x"), (1, "y"), (0, "x"), (1, "y"), (2, "y")], "y", [0]),
        ([(0, "x"), (1, "y"), (0, "x"), (1, "y"), (2, "x")], "x", [1]),
        ([(0, "x"), (1, "y"), (0, "y"), (1, "y"), (2, "y")], "y", [0]),  # it was wrong once
        ([(0, "x"), (1, "y"), (0, "y"), (1, "y")], "y", [0]),  # the same of two alone
        ([(0, "x"), (1, "y"), (0, "x"), (1, "x")], "x", [1]),
        ([(0, "x"), (1, "y"), (0, "z"), (1, "y"), (2, "y")], "y", [0]),
        ([(0, "x"), (1, "y"), (0, "x"), (1, "y")], None, []),
        ([(0, "x"), (1, "y"), (0, "y"), (1, "x")], None, []),
        ([(0, "x"), (1, "y"), (0, "x"), (1, "y"), (2, "z")], None, []),
        ([(0, "x"), (1, "y"), (0, "x"), (1, "z"), (2, "x")], "x", [1]),
    ],
)
def test_who_is_alone_with_a_result_is_wrong(
    votes: list[tuple[int, str]], truth: str | None, liars: list[int]
) -> None:
    assert judge(votes) == Judgement(truth, liars)
