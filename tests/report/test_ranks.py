"""Who is slow and why, from the times of all ranks."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_lb.report.ranks import RankTimes


def times(*ranks: tuple[float, float, float], step: int = 9) -> dict[str, Any]:
    """(data, compute, network) of each rank."""
    data, compute, network = map(list, zip(*ranks, strict=True))
    return {"epoch": 0, "step": step, "data": data, "compute": compute, "network": network}


def judge(ranks: RankTimes, *given: tuple[float, float, float]) -> tuple[dict[str, Any], list[str]]:
    told = ranks.add(times(*given))
    assert told
    return told


FINE = (1.0, 9.0, 2.0)


def hosts(count: int, every: float = 0.0, workers: list[int] | None = None) -> RankTimes:
    return RankTimes([f"h{rank // 2}" for rank in range(count)], workers or [1] * count, every)


@pytest.mark.parametrize(
    ("slow", "reason", "words"),
    [((10.0, 9.0, 0.1), "data", "waiting for data"), ((1.0, 18.0, 0.1), "compute", "computing")],
)
def test_a_straggler_is_named_once_until_it_was_none(
    slow: tuple[float, float, float], reason: str, words: str
) -> None:
    ranks, told = hosts(4), []
    for given in [slow] * 5 + [FINE] + [slow] * 4:
        record, messages = judge(ranks, FINE, FINE, FINE, given)
        told.append(messages)
        if given is slow:
            assert (record["slowest"], record["host"], record["reason"]) == (3, "h1", reason)
            assert record["slower"] == pytest.approx(1.9)
        assert record["median"] == pytest.approx(10)
    message = f"rank 3 on h1 is 1.9× slower than the median: {words}"
    assert told == [[], [], [message], [], [], [], [], [], [message], []]


def test_two_that_take_turns_are_each_named_once() -> None:
    ranks, told = hosts(5), []
    for turn in range(8):
        a, b = (1.0, 14.0 + turn % 2, 0.0), (1.0, 15.0 - turn % 2, 0.0)
        told += judge(ranks, FINE, a, FINE, b, FINE)[1]
    assert [message.split(" is ")[0] for message in told] == ["rank 1 on h0", "rank 3 on h1"]


def test_who_is_slow_only_now_and_then_or_by_little_is_not_named() -> None:
    for late in ((1.0, 18.0, 0.0), (1.0, 11.5, 0.0)):
        ranks = hosts(3)
        for turn in range(9):
            one = late if turn % 3 or late[1] < 12 else FINE
            assert judge(ranks, FINE, one, FINE)[1] == []
    ranks = hosts(3)  # half as much again, of a step in which the network takes nearly all
    for _ in range(5):
        record, messages = judge(ranks, (0.1, 0.1, 60.0), (0.1, 0.2, 59.9), (0.1, 0.1, 60.0))
        assert (messages, record["reason"]) == ([], "network")


def test_all_slow_is_nobody_slow_and_more_workers_are_no_fault() -> None:
    for ranks, given in (
        (hosts(3), [(9.0, 9.0, 0.0)] * 3),
        (hosts(3, workers=[1, 1, 2]), [(1.0, 5.0, 6.0), (1.0, 5.0, 6.0), (2.0, 10.0, 0.0)]),
    ):
        for _ in range(4):
            record, messages = judge(ranks, *given)
            assert messages == []
            assert record["slower"] == pytest.approx(1)


def test_times_are_added_up_between_records(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("hvd_lb.report.ranks.time.monotonic", lambda: clock[0])
    ranks = hosts(2, every=10.0)
    assert ranks.add(times(FINE, FINE)) is None
    clock[0] = 9.9
    assert ranks.add(times(FINE, FINE)) is None
    clock[0] = 10.0
    record, _ = judge(ranks, FINE, (2.0, 9.0, 1.0))
    assert (record["data"], record["compute"], record["network"]) == ([3.0, 4.0], [27.0, 27.0], [6.0, 5.0])
    assert (record["epoch"], record["step"]) == (0, 9)
    clock[0] = 11.0
    assert ranks.add(times(FINE, FINE)) is None


def test_one_rank_has_nobody_to_be_compared_with() -> None:
    assert hosts(1).add(times(FINE)) is None
