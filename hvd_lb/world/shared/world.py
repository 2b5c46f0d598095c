"""Sums between the processes of one machine, formed where their terms are: in memory that all of them see.

An engine would send each bucket through the loopback, with copies into the kernel and out of it, and beside them a
thread that takes a core from the network's own work. Here each of p processes adds up the p-th part of all buckets, and
writes it into all of them: what has to be read and written in any case, and nothing else.

The engine, which is there as well, tells processes where the others' memory is, once for each `room`; after that marks
in the memory itself tell who has brought its terms, and who has added its part. So the order in which processes begin
sums does not matter, as with Horovod. Whoever waits for a sum does what there is to be done. For one that does not wait
yet (its backward goes on, or it is in an exchange of another kind) a thread does it, after a while: nobody waits for a
process that waits for something else.
"""

from __future__ import annotations

import atexit
import os
import secrets
import select
import sys
import threading
import time
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from hvd_lb.errors import ExchangeError, UserError
from hvd_lb.world import ByEngine, Handle, Joined
from hvd_lb.world.gather import gather_bytes
from hvd_lb.world.shared.adding import add
from hvd_lb.world.shared.segment import OwnSegment, Segment

#: 0 in the environment of any of the processes: all sums are the engine's.
VARIABLE = "HVD_LB_SHARED_MEMORY"

# What the marks of a room tell: how many sums its process has brought its terms for, and added its part of.
_BROUGHT, _ADDED = 0, 1
# What those of a process tell: that it is the one meant, that it waits for a sum, and that it has left.
_WHO, _WAITS, _LEFT = 0, 1, 2
_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.float16, torch.bfloat16)
_HALF = (torch.float16, torch.bfloat16)
# Terms of all processes that a thread of a CPU adds up at once: what stays in a core's cache.
_CHUNK_BYTES = 1 << 19
# Elements that torch does not divide among threads: a thread of ours would be given as many more.
_CHUNK_ALONE = 1 << 14
# The thread looks so often whether there is something to do.
_PAUSE = 10e-3
# After so long a sum is taken for one that nobody will wait for.
_GIVEN_UP_SECONDS = 5.0
# A process that waits looks so often whether the others are alive.
_ALIVE_SECONDS = 0.1


class _Room:
    """Where the terms of a sum are: of this process, and once that is known of all, by rank."""

    def __init__(self, name: str, own: OwnSegment, count: int, dtype: torch.dtype) -> None:
        self.name, self.own, self.count, self.dtype = name, own, count, dtype
        self.all: list[Segment] = []
        self.asked: Handle | None = None  # where the others' are
        self.sums = 0  # that this process has begun
        self._key = _DTYPES.index(dtype)

    def ask(self, engine: ByEngine) -> None:
        places = torch.zeros(engine.size, 4, dtype=torch.int64, device="cpu")
        for at, number in enumerate((os.getpid(), self.own.descriptor or 0, self.count, self._key)):
            places[engine.rank, at] = number
        self.asked = engine.allreduce_async(places, f"{self.name}.places")

    def found(self, rank: int) -> bool:
        """Whether it is known where all are; ExchangeError where one has ended, ValueError where they do not fit."""
        if self.all:
            return True
        assert self.asked
        if not self.asked.done:
            return False
        rows, found = self.asked.wait().tolist(), list[Segment]()
        for other, (_, _, count, key) in enumerate(rows):
            if (count, key) != (self.count, self._key):
                raise ValueError(
                    f"{self.name}: rank {other} adds up {count:,} numbers of {_DTYPES[key]}, rank {rank} "
                    f"{self.count:,} of {self.dtype}"
                )
        for other, (pid, descriptor, count, _) in enumerate(rows):
            try:
                found.append(
                    self.own if other == rank else Segment.of_process(pid, descriptor, count, self.dtype)
                )
            except FileNotFoundError:
                raise ExchangeError(f"{self.name}: rank {other} has ended") from None
            except OSError as error:
                raise ExchangeError(
                    f"{self.name}: rank {rank} has no part in rank {other}'s memory: {error}"
                ) from None
        self.all = found  # by then all of them: another thread may look
        return True

    def marked(self, mark: int, number: int) -> bool:
        """Whether all processes have come so far with this sum."""
        return all(segment.marks[mark] >= number for segment in self.all)


class SharedSum:
    """A sum under way; `number` counts those of its room."""

    def __init__(self, world: SharedMemoryWorld, room: _Room, tensor: Tensor, name: str) -> None:
        self._world: SharedMemoryWorld | None = world  # until it is over
        self.room, self._tensor, self.name = room, tensor, name
        room.sums += 1
        self.number = room.sums
        self.began = time.monotonic()
        self.error: RuntimeError | ValueError | None = None
        # Where the part that is left begins, and its first sum where that is known.
        self._reached: tuple[int, Tensor | None] | None = None

    @property
    def done(self) -> bool:
        if self._world:
            self._world.advance()
        return self._world is None or self.formed

    @property
    def formed(self) -> bool:
        """Whether it is there, or never will be."""
        return self.error is not None or bool(self.room.all and self.room.marked(_ADDED, self.number))

    def wait(self) -> Tensor:
        if self._world:
            self._world.complete(self)
            self._world = None
        return self._tensor

    def add_part(self, rank: int, chunk: int) -> None:
        """Once all terms are there: the sum over all processes, in the order of ranks, of this one's part.

        An exception of a signal's handler may end it anywhere; called again, it goes on there.
        """
        terms, size = [segment.numbers() for segment in self.room.all], len(self.room.all)
        end = _begin(rank + 1, size, self.room.count)
        start, total = self._reached or (_begin(rank, size, self.room.count), None)
        while start < end:
            stop = start + total.numel() if total is not None else min(start + chunk, end)
            pieces = [each[start:stop] for each in terms]
            if total is None:
                total = _total(pieces)
                self._reached = start, total  # from here on terms are overwritten
            for piece in pieces:
                piece.copy_(total)
            start, total = self._reached = stop, None


def _total(pieces: list[Tensor]) -> Tensor:
    """In a tensor of its own; of half precision rounded once, where it is written to."""
    first, second, *others = pieces
    wide = torch.float32 if first.dtype in _HALF else first.dtype
    total = add(first.to(wide), second.to(wide), torch.empty_like(first, dtype=wide))
    for other in others:
        add(total, other.to(wide), total)
    return total


class SharedMemoryWorld:
    """The processes of an `engine`, all of one machine, whose `signs` are given by rank.

    Sums of what lies in a `room` are formed there, all else is the engine's.
    """

    def __init__(self, engine: ByEngine, signs: list[Segment], others: _Processes) -> None:
        self._engine, self._signs, self._others = engine, signs, others
        self.rank, self.size = engine.rank, engine.size
        self.local_rank, self.local_size = engine.local_rank, engine.local_size
        self._rooms: dict[int, _Room] = {}  # by address
        self._under_way: list[SharedSum] = []
        self._working, self._order = threading.Lock(), threading.Lock()
        self._begun = threading.Event()
        self._pid, self._left, self._failed = os.getpid(), False, False
        self._helper: threading.Thread | None = None

    def room(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or not count:
            return self._engine.room(name, count, dtype, device)
        self.advance()  # sums that nobody waits for, as of optimizers that are gone
        try:
            own = OwnSegment(count, dtype)
        except OSError as error:
            raise UserError(
                f"{name}: no memory in common for {count:,} numbers ({error}): raise the limit (ulimit), or set "
                f"{VARIABLE}=0 to add up by the engine"
            ) from None
        numbers = own.numbers()
        address = numbers.data_ptr()
        self._rooms[address] = _Room(name, own, count, dtype)
        weakref.finalize(numbers, self._rooms.pop, address, None).atexit = False
        return numbers

    def allreduce_async(self, tensor: Tensor, name: str) -> Handle:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"{name}: this process was forked from one of a job, and has no part in its sums"
            )
        room = None if tensor.is_cuda else self._rooms.get(tensor.data_ptr())
        if room is None or tensor.numel() != room.count or not tensor.is_contiguous():
            return self._engine.allreduce_async(tensor, name)
        if room.asked is None:
            room.ask(self._engine)
        begun = SharedSum(self, room, tensor, name)
        self._keep_order()
        room.own.marks[_BROUGHT] = begun.number
        self._under_way.append(begun)
        self._begun.set()
        if self._helper is None:
            self._helper = threading.Thread(target=self._help, name="sums", daemon=True)
            self._helper.start()
            atexit.register(self._end)
        return begun

    def complete(self, awaited: SharedSum) -> None:
        """Wait for a sum, and meanwhile do what there is to be done for any."""
        looked = time.monotonic()

        def done() -> bool:
            nonlocal looked
            self.advance()
            if awaited.formed:
                return True
            if time.monotonic() - looked > _ALIVE_SECONDS:
                looked = time.monotonic()
                # Who has ended may have done its part before.
                if (self._others.any_ended() or self._any(_LEFT)) and not awaited.formed:
                    raise ExchangeError(f"{awaited.name}: another process has ended")
            return False

        self._wait(1)
        try:
            self._engine.wait_for(done, awaited.name)
        except ExchangeError:
            self._failed = True
            raise
        finally:
            self._wait(-1)
        self._keep_order()
        if awaited.error:
            raise awaited.error
        awaited.room.own.close()  # all have found it

    def _wait(self, more: int) -> None:
        """So many more threads of this process do."""
        with self._order:
            self._signs[self.rank].marks[_WAITS] += more

    def advance(self, *, alone: bool = False) -> None:
        """Add this process's part of all sums of which all terms are there, with torch's threads or `alone`."""
        with self._working:
            for one in list(self._under_way):
                try:
                    if not one.room.found(self.rank):
                        continue
                except (RuntimeError, ValueError) as error:  # not those of a signal's handler
                    one.error = error
                else:
                    if not one.room.marked(_BROUGHT, one.number):
                        continue
                    self._keep_order()
                    bytes_of_all = one.room.dtype.itemsize * self.size
                    one.add_part(
                        self.rank,
                        _CHUNK_ALONE if alone else _CHUNK_BYTES // bytes_of_all * torch.get_num_threads(),
                    )
                    self._keep_order()
                    one.room.own.marks[_ADDED] = one.number
                self._under_way.remove(one)

    def _help(self) -> None:
        while not self._left:
            self._begun.wait()
            self._begun.clear()
            while self._under_way and not self._left:
                time.sleep(_PAUSE)
                if self._is_asked_for():
                    with suppress(Exception):  # whoever waits will have it, too
                        self.advance(alone=True)

    def _is_asked_for(self) -> bool:
        """Whether another process waits for this one, which does not wait; or nobody does, as for sums given up."""
        if self._signs[self.rank].marks[_WAITS]:
            return False
        oldest = next(iter(self._under_way), None)
        return self._any(_WAITS) or (
            oldest is not None and time.monotonic() - oldest.began > _GIVEN_UP_SECONDS
        )

    def _any(self, mark: int) -> bool:
        """Whether any process has it set."""
        return any(sign.marks[mark] for sign in self._signs)

    def _keep_order(self) -> None:
        """Numbers before the marks that tell of them, and marks before numbers: a lock is a barrier of memory (POSIX).

        One that has been released and is taken again lets nothing pass in either direction. x86 needs none.
        """
        for _ in range(2):
            with self._order:
                pass

    def _end(self) -> None:
        """At the end of the program: one that leaves in the middle of an exchange says so, and by its exit code."""
        if os.getpid() != self._pid:
            return
        self.advance()
        if self._under_way and not self._failed:
            print(f"rank {self.rank} ends in the middle of an exchange with the others", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        self._leave()

    def _leave(self) -> None:
        """Nothing is added here any more."""
        if os.getpid() != self._pid:  # a fork's end
            return
        atexit.unregister(self._end)
        self.advance()  # what others may still wait for
        self._signs[self.rank].marks[_LEFT] = self._left = True
        self._begun.set()
        if self._helper:
            self._helper.join()
        with self._working:
            self._under_way.clear()
            self._rooms.clear()
        self._others.close()

    def maximum_async(self, tensor: Tensor, name: str) -> Handle:
        return self._engine.maximum_async(tensor, name)

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.allreduce_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        return self._engine.broadcast(tensor, name)

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        return self._engine.broadcast_bytes(data, name)

    def barrier(self) -> None:
        self._engine.barrier()

    def shutdown(self) -> None:
        self.advance()  # what others may still wait for
        self._engine.shutdown()
        self._leave()

    def cut(self) -> None:
        self._engine.cut()

    def abandon(self) -> None:
        self._leave()
        self._engine.abandon()


class _Processes:
    """Other processes of this machine, of which it can be asked whether one has ended."""

    def __init__(self) -> None:
        self._poll, self._descriptors = select.poll(), list[int]()
        self._asking = threading.Lock()  # threads cannot ask at once

    def add(self, pid: int) -> None:
        self._descriptors.append(os.pidfd_open(pid))
        self._poll.register(self._descriptors[-1], select.POLLIN)

    def any_ended(self) -> bool:
        with self._asking:
            return bool(self._poll.poll(0))

    def close(self) -> None:
        self._poll = select.poll()
        while self._descriptors:
            os.close(self._descriptors.pop())


def through_memory(engine: ByEngine, *, wanted: bool) -> Joined:
    """A world whose sums go through the memory of its machine; the engine itself where its processes have several.

    Also where it is not `wanted` by one of them, or one cannot look into another, which is told. Collective.
    """
    if engine.size == 1 or engine.local_size != engine.size:
        return engine
    others, reason, own = _Processes(), "", None
    signs = list[Segment]()
    rows = torch.zeros(engine.size, 3, dtype=torch.int64, device="cpu")
    try:
        if wanted and os.environ.get(VARIABLE) != "0":
            own = OwnSegment(0, torch.int64)
            own.marks[_WHO] = secrets.randbits(62)
            for at, number in enumerate((os.getpid(), own.descriptor or 0, int(own.marks[_WHO]))):
                rows[engine.rank, at] = number
    except (OSError, AttributeError) as error:  # of a kernel, or a Python, that has none
        reason = str(error)
    engine.allreduce(rows, "hvd_lb.shared.signs")
    if wanted := bool(rows[:, 0].all()):  # by all
        try:
            for rank, (pid, descriptor, who) in enumerate(rows.tolist()):
                if rank == engine.rank and own:
                    signs.append(own)
                    continue
                signs.append(Segment.of_process(pid, descriptor, 0, torch.int64))
                if signs[-1].marks[_WHO] != who:
                    raise OSError(f"process {pid} is another one here")
                others.add(pid)
        except (OSError, AttributeError) as error:
            reason = str(error)
    reasons = [each.decode() for each in gather_bytes(engine, reason.encode(), "hvd_lb.shared.reasons")]
    if own:
        own.close()
    if wanted and not any(reasons):
        return SharedMemoryWorld(engine, signs, others)
    others.close()
    if any(reasons) and engine.rank == 0:
        why = next(filter(None, reasons))
        print(f"sums go through the engine, as processes have no memory in common: {why}", file=sys.stderr)
    return engine


def _begin(part: int, parts: int, count: int) -> int:
    """Where one of so many parts of `count` numbers begins: where a line of the cache does."""
    return count if part == parts else count * part // parts // 16 * 16
