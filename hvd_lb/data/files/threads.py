"""Many small pieces of work that may have to wait for a file system, or may not, done in order by as many threads as
help.

How long a file takes is known only by reading it, and changes on the way: what was read before is cached, the rest
lies far away. So the number of threads is found while they work, and so is how much each takes at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")

MOST_THREADS = 64
_MOST_AT_A_TIME, _MOST_AHEAD = 256, 4096
_PIECE_SECONDS = 0.01
"""So long a thread works before it hands over what it has, so that handing over does not count."""

_WINDOW_SECONDS = 0.02
_PAUSE, _LONGEST_PAUSE = 8, 64  # windows
_CALM_SECONDS, _LONGEST_CALM_SECONDS = 1.0, 60.0
_MORE, _AS_MUCH = 1.25, 0.9
"""More threads are kept where they do at least so many times as much, fewer where they do at least so much."""

_JOIN_SECONDS = 5.0


def in_threads(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """What `work` makes of each item, in order; an error of its own or of `items` comes at its place."""
    threads: InOrder[S, T] = InOrder(partial(map, work), items, "hvd-lb index")
    try:
        yield from threads
    finally:
        threads.close()


@dataclass
class Climb:
    """How many threads, from `least` to `most`: other numbers are tried for a while, and kept where they help.

    More are tried first: as many as the share of time would keep busy in which a piece of work waits, or twice as
    many; then half as many. Nothing is tried while the consumer need not wait; after a second of that (twice as long
    each time that it then had to wait) half of the threads go, but for those of the start: idle ones cost too, and a
    start, when all wait, looks like slow files. What did not help is tried again after a pause that grows, or when the
    work itself became much slower or faster.
    """

    count: int = 1
    least: int = 1
    most: int = MOST_THREADS
    _up: bool = True
    _before: tuple[int, float] | None = None  # the number and rate that the number on trial is compared with
    _rate: float = 0.0
    _pause: int = 0
    _left: int = 0  # windows of the pause
    _skip: int = 0  # pieces that may have been begun with the former number of threads
    _window: _Window = field(default_factory=lambda: _Window())
    _calm_since: float | None = None
    _calm_seconds: float = _CALM_SECONDS
    _have_let_go: bool = False

    def __post_init__(self) -> None:
        self._first = self.count

    def note(self, items: int, seconds: float, busy: float, hungry: bool) -> None:
        """A piece of so many items took so many seconds, `busy` of them of a core; `hungry`: the consumer waits."""
        self._let_go(hungry)
        window = self._window
        if self._skip:
            self._skip -= 1
            if not self._skip:
                self._window = _Window()
            return
        window.items += items
        window.pieces += 1
        window.hungry += hungry
        window.seconds += seconds
        window.busy += busy
        length = time.perf_counter() - window.began
        if length >= _WINDOW_SECONDS and window.pieces >= self.count:
            self._window = _Window()
            if 2 * window.hungry > window.pieces:
                self._decide(window.items / length, window.seconds / max(window.busy, 1e-6))
            else:
                self._before = None

    def _let_go(self, hungry: bool) -> None:
        now = time.perf_counter()
        if hungry:
            if self._have_let_go:
                self._calm_seconds = min(2 * self._calm_seconds, _LONGEST_CALM_SECONDS)
            self._calm_since, self._have_let_go = None, False
        elif self._calm_since is None:
            self._calm_since = now
        elif self.count > self._first and now - self._calm_since >= self._calm_seconds:
            self._calm_since, self._have_let_go, self._before = now, True, None
            self._set(max(self._first, self.count // 2))

    def _decide(self, rate: float, share: float) -> None:
        before, self._before = self._before, None
        if before is not None:
            if rate < before[1] * (_MORE if self._up else _AS_MUCH):
                self._up = not self._up
                self._pause = self._left = min(max(_PAUSE, 2 * self._pause), _LONGEST_PAUSE)
                self._set(before[0])
                return
            self._pause = 0
        elif self._left:
            if 0.5 < rate / self._rate < 2:
                self._left -= 1
                self._rate = rate
                return
            self._pause = self._left = 0
            self._up = rate < self._rate
        self._rate = rate
        up = min(self.most, max(2 * self.count, round(share)))
        in_the_way = share < 4 * self.count  # perhaps of each other: they keep a quarter of a core busy
        down = max(self.least, self.count // 2) if in_the_way else self.count
        if (up if self._up else down) == self.count:
            self._up = not self._up
        wanted = up if self._up else down
        if wanted != self.count:
            self._before = (self.count, rate)
            self._set(wanted)

    def _set(self, count: int) -> None:
        self._skip, self.count = self.count, count


@dataclass
class _Window:
    began: float = field(default_factory=lambda: time.perf_counter())
    items: int = 0
    pieces: int = 0
    hungry: int = 0
    seconds: float = 0.0
    busy: float = 0.0


@dataclass
class _Piece(Generic[S, T]):
    items: list[S] = field(default_factory=list)
    weight: int = 0
    results: list[T] = field(default_factory=list)
    failure: BaseException | None = None
    done: bool = False


class InOrder(Generic[S, T]):
    """Iterates over what `work` makes of `items`, in their order, begun ahead of the consumer by threads.

    `work` gets some consecutive items and gives a result for each, one after the other. What it or `items` raises is
    raised after the results before it; nothing is begun after that. More is begun while `room(ahead, held)`, with the
    items begun and not taken, and what their results weigh (of those under way it is estimated). `threads` fixes
    their number; else they are as many as help, `start` at first and no more than `most`.

    `close` ends the threads after what they have under way and never blocks for long: one that hangs in a file system
    is left behind as a daemon.
    """

    def __init__(
        self,
        work: Callable[[list[S]], Iterable[T]],
        items: Iterable[S],
        name: str,
        *,
        threads: int | None = None,
        start: int = 1,
        most: int = MOST_THREADS,
        room: Callable[[int, int], bool] = lambda ahead, held: ahead < _MOST_AHEAD,
        weigh: Callable[[T], int] = lambda result: 0,
    ) -> None:
        self._work, self._items, self._name = work, iter(items), name
        self._room, self._weigh = room, weigh
        self._climb = Climb(threads, threads, threads) if threads else Climb(start, most=max(start, most))
        # Whoever takes items holds `_taking`, and waits for room with it: the others queue up behind.
        self._taking = threading.Lock()
        self._lock = threading.Lock()
        self._has_room, self._has_result = threading.Condition(self._lock), threading.Condition(self._lock)
        self._pieces: deque[_Piece[S, T]] = deque()
        self._ahead = self._held = 0
        self._weighed = self._weights = 0
        self._waiting = self._ended = self._closed = False
        self._alive = 0
        self._threads: list[threading.Thread] = []
        self._results: Iterator[T] = self._take()
        self._grow()

    def __iter__(self) -> Iterator[T]:
        return self._results

    def close(self) -> None:
        with self._lock:
            self._ended = self._closed = True
            self._has_room.notify_all()
            self._has_result.notify_all()
            threads = list(self._threads)
        until = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        if not any(thread.is_alive() for thread in threads) and isinstance(self._items, Generator):
            self._items.close()
        with self._lock:
            self._pieces.clear()
        # Without these circles all that is held here goes with the last reference to it.
        self._results, self._room = iter(()), lambda ahead, held: False

    def _take(self) -> Iterator[T]:
        while True:
            with self._lock:
                self._waiting = True
                self._has_result.wait_for(self._next_is_known)
                self._waiting = False
                if self._closed or not self._pieces:
                    return
                piece = self._pieces.popleft()
                self._ahead -= len(piece.items)
                self._held -= piece.weight
                self._has_room.notify()
            yield from piece.results
            if piece.failure is not None:
                raise piece.failure

    def _next_is_known(self) -> bool:
        return self._closed or (self._pieces[0].done if self._pieces else self._ended)

    def _grow(self) -> None:
        """Start the threads that are wanted; fewer where there can be no more."""
        while True:
            with self._lock:
                if self._ended or self._alive >= self._climb.count:
                    return
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the machine's or the container's limit
                    if not self._alive:
                        raise
                    self._climb.most = self._climb.count = self._alive
                else:
                    self._alive += 1
                    self._threads = [thread, *(of for of in self._threads if of.is_alive())]

    def _run(self) -> None:
        at_a_time = 1
        while (piece := self._begin(at_a_time)) is not None:
            began, busy = time.perf_counter(), time.thread_time()
            try:
                piece.results.extend(self._work(piece.items) if piece.items else ())
            except BaseException as error:  # raised again where the results are used
                piece.failure = error
            seconds, busy = time.perf_counter() - began, time.thread_time() - busy
            self._finish(piece, seconds, busy)
            most = int(_PIECE_SECONDS * len(piece.items) / max(seconds, 1e-9))
            at_a_time = max(1, min(2 * at_a_time, most, _MOST_AT_A_TIME))

    def _begin(self, at_a_time: int) -> _Piece[S, T] | None:
        """The next items; None where this thread is to end."""
        with self._taking:
            with self._lock:
                self._has_room.wait_for(lambda: self._ended or self._room(self._ahead, self._held))
                if self._ended or self._alive > self._climb.count:
                    self._alive -= 1
                    return None
            piece: _Piece[S, T] = _Piece()
            try:
                piece.items.extend(islice(self._items, at_a_time))
            except BaseException as error:  # those before it are in the list
                piece.failure = error
            with self._lock:
                if len(piece.items) < at_a_time:
                    self._ended = True
                piece.weight = len(piece.items) * self._weights // max(1, self._weighed)
                self._ahead += len(piece.items)
                self._held += piece.weight
                self._pieces.append(piece)
            return piece

    def _finish(self, piece: _Piece[S, T], seconds: float, busy: float) -> None:
        weight = sum(map(self._weigh, piece.results))
        with self._lock:
            self._weighed += len(piece.results)
            self._weights += weight
            self._held += weight - piece.weight
            piece.weight, piece.done = weight, True
            self._ended |= piece.failure is not None
            self._climb.note(len(piece.results), seconds, busy, self._waiting)
            if self._pieces and piece is self._pieces[0]:
                self._has_result.notify()
            grow = self._alive < self._climb.count
        if grow:
            self._grow()
