"""Work in order, in one thread where nothing waits and in many where all do."""

from __future__ import annotations

import threading
import time

import pytest

from hvd_lb.data.files.threads import in_threads


def test_results_come_in_order() -> None:
    assert list(in_threads(lambda item: item * item, range(1000))) == [item * item for item in range(1000)]
    assert list(in_threads(lambda item: item, [])) == []


def test_what_waits_is_done_at_once_and_in_order() -> None:
    used = set()

    def wait(item: int) -> int:
        used.add(threading.get_ident())
        time.sleep(0.01)
        return item

    began = time.perf_counter()
    assert list(in_threads(wait, range(300))) == list(range(300))
    assert len(used) > 4
    assert time.perf_counter() - began < 2


def test_an_error_is_raised_at_its_place() -> None:
    def fail(item: int) -> int:
        time.sleep(0.002)
        if item == 40:
            raise ValueError("forty")
        return item

    results = in_threads(fail, range(100))
    assert [next(results) for _ in range(40)] == list(range(40))
    with pytest.raises(ValueError, match="forty"):
        next(results)
