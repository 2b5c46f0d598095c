"""Images are read ahead in order, by many threads at once, as far as seconds and bytes allow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from loader_cases import AtOnce, one_window

from hvd_lb.data.decoding.stand_in import Content
from hvd_lb.data.files.threads import MOST_THREADS
from hvd_lb.data.loading import raw_batches
from hvd_lb.data.loading.raw_batches import RawBatches
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Microbatch

Read = Callable[[np.ndarray], Iterable[Content]]


def number(image_id: int) -> np.ndarray:
    return np.array([image_id])


def each(read: Callable[[int], Content]) -> Read:
    return lambda ids: map(read, ids.tolist())


def microbatches(sizes: Iterable[int]) -> Iterator[Microbatch]:
    start = 0
    for size in sizes:
        yield one_window(list(range(start, start + size)), 0, 0, 4, False)
        start += size


def settled(count: Callable[[], int]) -> int:
    """The number, once it does not grow any more."""
    before = -1
    while count() != before:
        before = count()
        time.sleep(0.2)
    return before


@pytest.mark.parametrize("threads", [None, 1, 9])
def test_microbatches_come_in_order_and_whole(threads: int | None) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, 60).tolist()
    waits = rng.exponential(0.0005, sum(sizes)).tolist()

    def late(image_id: int) -> np.ndarray:
        time.sleep(waits[image_id])
        return number(image_id)

    before = threading.active_count()
    batches = RawBatches(each(late), microbatches(sizes), 40, threads=threads)
    for expected, batch in zip(microbatches(sizes), batches, strict=True):
        np.testing.assert_array_equal(batch.microbatch.image_ids, expected.image_ids)
        np.testing.assert_array_equal(np.concatenate(batch.data), expected.image_ids)
    batches.close()
    assert threading.active_count() == before


def test_an_image_that_takes_long_does_not_hold_up_those_of_later_microbatches() -> None:
    far = threading.Event()

    def read(image_id: int) -> np.ndarray:
        if image_id == 0:
            assert far.wait(30)
        if image_id == 4 * 10:
            far.set()
        return number(image_id)

    batches = RawBatches(each(read), microbatches([4] * 20), 4, threads=2)
    assert [len(batch.data) for batch in batches] == [4] * 20
    batches.close()


def test_many_reads_are_under_way_where_each_takes_long() -> None:
    late = AtOnce()

    def read(image_id: int) -> np.ndarray:
        late.wait(0.005)
        return number(image_id)

    batches = RawBatches(each(read), microbatches([32] * 25), 32, start=2)
    assert sum(len(batch.data) for batch in batches) == 800
    assert late.most > 6
    batches.close()


@pytest.mark.parametrize("threads", [None, 5])
def test_errors_come_after_the_microbatches_before(threads: int | None) -> None:
    def read(image_id: int) -> np.ndarray:
        if image_id >= 30:
            raise UserError(f"image {image_id}")
        return number(image_id)

    batches = RawBatches(each(read), microbatches([8] * 10), 8, threads=threads)
    assert [int(next(batches).data[-1][0]) for _ in range(3)] == [7, 15, 23]
    with pytest.raises(UserError, match="^image 30$"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_an_error_of_the_plan_comes_after_its_microbatches() -> None:
    def failing() -> Iterator[Microbatch]:
        yield from microbatches([8] * 4)
        raise RuntimeError("the plan failed")

    batches = RawBatches(each(number), failing(), 8)
    assert [len(next(batches).data) for _ in range(4)] == [8] * 4
    with pytest.raises(RuntimeError, match="the plan failed"):
        next(batches)
    batches.close()


def test_bytes_bound_what_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_batches, "AHEAD_BYTES", 10_000_000)
    read: list[int] = []

    def large(image_id: int) -> np.ndarray:
        read.append(image_id)
        time.sleep(0.012)  # so that a thread takes one at a time
        return np.zeros(1_000_000, np.uint8)

    batches = RawBatches(each(large), microbatches([2] * 200), 2, threads=4)
    next(batches)
    assert 10 <= settled(lambda: len(read)) <= 2 + 10 + 4
    for _ in range(5):
        next(batches)
    assert 20 <= settled(lambda: len(read)) <= 12 + 10 + 4
    batches.close()


def test_two_microbatches_are_read_ahead_however_many_bytes_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(raw_batches, "AHEAD_BYTES", 0)
    read: list[int] = []

    def slow(image_id: int) -> np.ndarray:
        read.append(image_id)
        time.sleep(0.012)  # so that a thread takes one at a time
        return number(image_id)

    batches = RawBatches(each(slow), microbatches([5] * 20), 5, threads=1)
    for taken in (5, 10):
        next(batches)
        assert taken + 10 <= settled(lambda: len(read)) <= taken + 12
    batches.close()


def test_a_microbatch_of_more_bytes_than_that_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_batches, "AHEAD_BYTES", 1000)
    batches = RawBatches(each(lambda _: np.zeros(1000, np.uint8)), microbatches([20] * 5), 20)
    assert [len(batch.data) for batch in batches] == [20] * 5
    batches.close()


def test_seconds_bound_what_is_read_ahead() -> None:
    """Nobody has taken anything for a while: that many threads have enough to do, and no more is read."""
    read: list[int] = []

    def small(image_id: int) -> np.ndarray:
        read.append(image_id)
        time.sleep(0.002)  # so that a thread takes five at a time
        return number(image_id)

    batches = RawBatches(each(small), microbatches([1] * 10_000), 1, threads=8)
    assert MOST_THREADS <= settled(lambda: len(read)) <= MOST_THREADS + 5
    for _ in range(300):
        next(batches)
    assert settled(lambda: len(read)) + 8 >= 300 + 2 * 300
    assert len(read) <= 300 + raw_batches.AHEAD_SECONDS * 300 / raw_batches._WINDOW_SECONDS + 8 * 5
    batches.close()


def test_a_pause_tells_nothing_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(raw_batches.time, "perf_counter", lambda: now)
    rate = raw_batches._Rate()
    for _ in range(200):
        now += 0.1
        rate.add(32)
    assert rate.a_second() == pytest.approx(320, rel=0.2)
    now += 300
    rate.add(32)
    assert rate.a_second() == pytest.approx(320, rel=0.5)
    for _ in range(200):
        now += 0.4
        rate.add(32)
    assert rate.a_second() == pytest.approx(80, rel=0.2)


def test_closing_ends_the_threads_and_whoever_waits() -> None:
    before = threading.active_count()

    def late(image_id: int) -> np.ndarray:
        time.sleep(0.3)
        return number(image_id)

    batches = RawBatches(each(late), microbatches([1000] * 3), 1000, threads=8)
    ended: list[object] = []
    consumer = threading.Thread(target=lambda: ended.append(next(batches, "closed")))
    consumer.start()
    time.sleep(0.1)
    batches.close()
    batches.close()
    consumer.join(10)
    assert ended == ["closed"]
    assert threading.active_count() == before
