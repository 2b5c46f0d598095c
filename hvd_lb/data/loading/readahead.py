"""Work done ahead of need: a thread runs an iterator and keeps a bounded number of its results ready."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_JOIN_SECONDS = 5.0


class ReadAhead(Generic[T]):
    """Iterates `source` in a thread, at most `depth` results ahead.

    What the source raises is raised to the consumer after the results before it. `close` ends the thread at
    its next result and never blocks for long; a source that hangs is left behind in a daemon thread.
    """

    def __init__(self, source: Iterable[T], depth: int, name: str) -> None:
        self.wait_seconds = 0.0
        self._source = source
        self._depth = depth
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or self._closed)
            self.wait_seconds += time.perf_counter() - began
            if self._ready and not self._closed:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._failure is not None and not self._closed:
                failure, self._failure = self._failure, None
                raise failure
        raise StopIteration

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        iterator = iter(self._source)
        failure: BaseException | None = None
        try:
            for result in iterator:
                if not self._put(result):
                    break
        except BaseException as error:  # raised again where the results are used
            failure = error
        finally:
            # A generator's own clean-up (it may hold the read-ahead before this one) runs here, in its
            # thread.
            if close := getattr(iterator, "close", None):
                close()
        with self._changed:
            self._failure = failure
            self._ended = True
            self._changed.notify_all()

    def _put(self, result: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            if not self._closed:
                self._ready.append(result)
                self._changed.notify_all()
            return not self._closed
