"""Work in order, by few threads where nothing waits and by many where all do, also where that changes on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from loader_cases import AtOnce

from hvd_lb.data.files import threads
from hvd_lb.data.files.threads import MOST_THREADS, Climb, InOrder, in_threads


def test_results_come_in_order() -> None:
    assert list(in_threads(lambda item: item * item, range(1000))) == [item * item for item in range(1000)]
    assert list(in_threads(lambda item: item, [])) == []


def test_what_waits_is_done_at_once_and_in_order() -> None:
    late = AtOnce()

    def wait(item: int) -> int:
        late.wait(0.01)
        return item

    assert list(in_threads(wait, range(300))) == list(range(300))
    assert late.most > 4


def test_what_waits_is_done_at_once_although_nothing_did_before() -> None:
    late = AtOnce()

    def look(item: int) -> int:
        if item < 100:
            began = time.thread_time()
            while time.thread_time() - began < 0.001:
                pass
        else:
            late.wait(0.005)
        return item

    assert list(in_threads(look, range(900))) == list(range(900))
    assert late.most > 4


def test_an_error_is_raised_at_its_place() -> None:
    def fail(item: int) -> int:
        if item % 3 == 0:
            time.sleep(0.002)
        if item >= 40:
            raise ValueError(str(item))
        return item

    def cut_off() -> Iterator[int]:
        yield from range(40)
        raise ValueError("40")

    for results in (in_threads(fail, range(100)), in_threads(lambda item: item, cut_off())):
        assert [next(results) for _ in range(40)] == list(range(40))
        with pytest.raises(ValueError, match="^40$"):
            next(results)
        assert next(results, None) is None


def test_whoever_stops_looking_leaves_no_thread() -> None:
    before = threading.active_count()
    assert not all(in_threads(lambda item: (time.sleep(0.002), item < 50)[1], range(10_000)))
    assert threading.active_count() == before


def test_little_is_begun_that_is_not_asked_for() -> None:
    begun: list[int] = []
    work = InOrder(
        lambda items: map(begun.append, items),
        range(10_000),
        "x",
        threads=4,
        room=lambda ahead, _: ahead < 10,
    )
    results = iter(work)
    next(results)
    time.sleep(0.2)
    assert len(begun) <= 1 + 10 + 2 * threads._MOST_AT_A_TIME
    work.close()


def test_where_no_more_threads_can_be_had_fewer_do(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    work = InOrder(lambda items: (time.sleep(0.001 * len(items)), items)[1], range(200), "x")
    assert list(work) == list(range(200))
    work.close()
    assert len(started) == 3


Rate = Callable[[int], float]


def climbed(climb: Climb, rate: Rate, busy: float, pieces: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads over so many pieces, n of which are done at `rate(n)` a second, each `busy` so long."""
    now = [time.perf_counter()]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    climb._window = threads._Window()
    counts = []
    for _ in range(pieces):
        now[0] += 1 / rate(climb.count)
        climb.note(1, climb.count / rate(climb.count), busy, hungry=True)
        counts.append(climb.count)
    monkeypatch.undo()
    return counts


def test_as_many_threads_as_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(most: float) -> Rate:
        return lambda count: min(count / 0.005, most)

    climb = Climb()
    assert np.mean(climbed(climb, late(1e6), 5e-5, 20_000, monkeypatch)[200:]) > 0.95 * MOST_THREADS
    # Now nothing waits, and they would only get into each other's way.
    assert set(
        climbed(climb, lambda count: 2000 / (1 + 0.02 * count), 5e-4, 20_000, monkeypatch)[-10_000:]
    ) <= {1, 2}
    # And again.
    assert np.mean(climbed(climb, late(1e6), 5e-5, 20_000, monkeypatch)[2000:]) > 0.95 * MOST_THREADS
    # A server that gives no more than what 10 get at once.
    climbed(server := Climb(), late(2000), 4e-4, 10_000, monkeypatch)
    assert 8 <= np.median(climbed(server, late(2000), 4e-4, 10_000, monkeypatch)) <= 32


def test_what_is_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(climbed(Climb(5, 5, 5), lambda count: count / 0.005, 5e-5, 2000, monkeypatch)) == {5}


def test_threads_go_when_nobody_waits_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    climb = Climb(2)
    climb.count = 64

    def calm(seconds: float) -> int:
        for _ in range(round(seconds * 10)):
            now[0] += 0.1
            climb.note(1, 0.1, 0.0001, hungry=False)
        return climb.count

    assert calm(0.9) == 64
    assert calm(0.4) == 32
    assert calm(20) == 2  # those of the start stay
    climb.count = 64
    climb.note(1, 0.1, 0.0001, hungry=True)
    assert calm(1.5) == 64, "it was regretted: now it takes two seconds"
    assert calm(1) == 32


def test_nothing_is_tried_while_nobody_waits() -> None:
    climb = Climb(3)
    for _ in range(500):
        climb.note(1, 0.1, 0.0001, hungry=False)
        climb._window.began -= 0.1
    assert climb.count == 3
