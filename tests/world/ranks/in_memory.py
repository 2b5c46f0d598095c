"""Run by test_shared_memory.py in every process of a job. Arguments: engine, and what to try."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hvd_lb
from hvd_lb.errors import ExchangeError, UserError
from hvd_lb.world import World, abandon
from hvd_lb.world.shared import world as shared
from hvd_lb.world.shared.segment import Segment
from hvd_lb.world.shared.world import SharedMemoryWorld

CPU = torch.device("cpu")


def sums(world: Any) -> None:
    """Of all types and sizes, begun and awaited in another order on each process, several times each."""
    started: list[str] = []
    through_the_engine = world._engine.allreduce_async
    world._engine.allreduce_async = lambda tensor, name: (
        started.append(name),
        through_the_engine(tensor, name),
    )[1]
    kinds = list(itertools.product(shared._DTYPES, (1, 17, 300_001)))
    rooms = [world.room(f"room {kind}", count, dtype, CPU) for kind, (dtype, count) in enumerate(kinds)]
    for turn in range(3):
        order = torch.randperm(
            len(kinds), generator=torch.Generator().manual_seed(7 * turn + world.rank)
        ).tolist()
        handles = {}
        for kind in order:
            rooms[kind].copy_(terms(*kinds[kind], turn, world.rank))
            handles[kind] = world.allreduce_async(rooms[kind], f"sum {kind}")
        for kind in reversed(order):
            found = handles[kind].wait()
            assert found is rooms[kind]
            assert handles[kind].done
            assert found.equal(expected(world, *kinds[kind], turn)), (kinds[kind], turn)
            assert handles[kind].wait() is found
    assert sorted(started) == sorted(f"room {kind}.places" for kind in range(len(kinds)))
    # What lies elsewhere, or is a part of a room, is summed by the engine.
    beside, part = torch.ones(5), rooms[2][:7]
    part.fill_(2)
    assert world.allreduce(beside, "beside").tolist() == [world.size] * 5
    assert world.allreduce(part, "part").tolist() == [2 * world.size] * 7


def terms(dtype: torch.dtype, count: int, turn: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return (torch.randn(count, dtype=torch.float64, generator=generator) * 1000).to(dtype)


def expected(world: World, dtype: torch.dtype, count: int, turn: int) -> Tensor:
    """In the order of ranks; in half precision rounded once."""
    each = [terms(dtype, count, turn, rank) for rank in range(world.size)]
    total = each[0].float() if dtype.itemsize == 2 else each[0]
    for term in each[1:]:
        total = total + term
    return total.to(dtype)


def memory_is_given_back(world: Any) -> None:
    def there() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("memfd:hvd-lb")
        return maps, len(world._rooms), len(os.listdir("/proc/self/fd"))

    def use(name: str) -> Tensor:
        room = world.room(name, 1000, torch.float32, CPU)
        room.fill_(1)
        assert bool((world.allreduce(room, name) == world.size).all())
        return room[10:].data  # as a gradient that somebody keeps

    use("first")
    world.barrier()
    before = there()
    for number in range(3):
        use(f"room {number}")
    world.barrier()
    assert there() == before
    kept = use("kept")
    assert there() == (before[0] + 1, *before[1:]), (before, there())  # its own, and no other's
    assert bool((kept == world.size).all())


def elsewhere(world: Any) -> None:
    """One process waits for a sum before it does what the others do first."""
    room = world.room("room", 100_000, torch.float32, CPU)
    for number in range(3):
        room.fill_(1)
        begun = world.allreduce_async(room, "sum")
        if world.rank == number % world.size:
            begun.wait()
        world.barrier()
        assert bool((begun.wait() == world.size).all())


def late(world: Any) -> None:
    """Who has not begun yet may be late."""
    room = world.room("room", 1000, torch.int64, CPU)
    if world.rank == 1:
        time.sleep(1)
    room.fill_(2**40)
    assert bool((world.allreduce(room, "sum") == world.size * 2**40).all())


def killed(world: Any) -> None:
    room = world.room("room", 1000, torch.float32, CPU)
    world.allreduce(room, "sum")
    killed_before_it_is_found(world, room)


def killed_before_it_is_found(world: Any, room: Tensor | None = None) -> None:
    room = world.room("room", 1000, torch.float32, CPU) if room is None else room
    begun = world.allreduce_async(room, "sum")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun.wait()


def left(world: Any) -> None:
    """A process leaves the job, and lives on."""
    room = world.room("room", 1000, torch.float32, CPU)
    world.allreduce(room, "sum")
    if world.rank == 1:
        abandon()
        time.sleep(3)
    else:
        world.allreduce(room, "the sum of those who stay")


def raises(world: Any) -> None:
    room = world.room("room", 1000, torch.float32, CPU)
    world.allreduce(room, "sum")
    if world.rank == 1:
        raise RuntimeError("mine")
    world.allreduce(room, "sum")


def unequal(world: Any) -> None:
    room = world.room("room", 1000 + world.rank, torch.float32, CPU)
    try:
        world.allreduce(room, "sum")
    except ValueError as error:
        print(f"rank {world.rank}: {error}", flush=True)
    world.barrier()


def again(world: World) -> None:
    gc.disable()  # what a world has opened goes with it, and not some time
    descriptors, kept = [], []
    for _ in range(4):
        room = world.room("room", 1000, torch.float32, CPU)
        kept.append(world.allreduce_async(room.fill_(1), "sum"))
        assert bool((kept[-1].wait() == world.size).all())
        world.barrier()
        abandon()
        world = hvd_lb.init(sys.argv[1])  # type: ignore[arg-type]
        assert isinstance(world, SharedMemoryWorld)
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert len(set(descriptors)) == 1, descriptors


def forked(world: Any) -> None:
    """A child that has its parent's functions called at its end is not its parent."""
    room = world.room("room", 1000, torch.float32, CPU)
    world.allreduce(room, "sum")
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        world.barrier()
        world.allreduce(room.fill_(1), "sum")
        assert bool((room == world.size).all())
    else:
        world._leave()
        os._exit(0)


def threads(world: Any) -> None:
    """By several of them, as many a chunk longer."""
    torch.set_num_threads(2)
    sums(world)


def found_by_two_threads(world: Any) -> None:
    """The helper of the last rank still looks for the others' memory when the main thread begins to wait."""
    found = Segment.of_process

    def slowly(*place: Any) -> Segment:
        time.sleep(0.02)
        return found(*place)

    if world.rank == world.size - 1:
        Segment.of_process = slowly  # type: ignore[method-assign]
    for number in range(5):
        room = world.room(f"room {number}", 30_000, torch.float32, CPU)
        world.barrier()
        begun = world.allreduce_async(room.fill_(1), "sum")
        if world.rank == world.size - 1:
            time.sleep(0.025)
        assert bool((begun.wait() == world.size).all()), number


def interrupted(world: Any) -> None:
    """By an exception out of a signal's handler, at any moment: whoever waits again has the sum."""

    class Alarm(KeyboardInterrupt):
        pass

    class Late(Exception):
        pass

    def ring(*_: Any) -> None:
        raise kind

    signal.signal(signal.SIGALRM, ring)
    room, interruptions = world.room("room", 3_000_000, torch.float32, CPU), 0
    for number in range(40):
        kind = (Alarm, Late)[number % 2]
        room.fill_(1)
        world.barrier()
        begun = world.allreduce_async(room, "sum")
        if world.rank == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.0002 * (1 + number % 20))
        while True:
            try:
                begun.wait()
                break
            except (Alarm, Late):
                interruptions += 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except (Alarm, Late):
            interruptions += 1
        assert bool((room == world.size).all()), number
    assert interruptions or world.rank


def waiting_threads(world: Any) -> None:
    """Many of a process at once, for another one that is late."""
    rooms = [world.room(f"room {number}", 1000, torch.float32, CPU) for number in range(12)]
    if world.rank == 1:
        time.sleep(1)
    with ThreadPoolExecutor(len(rooms)) as pool:
        waits = [pool.submit(world.allreduce, room.fill_(1), f"sum {at}") for at, room in enumerate(rooms)]
        assert all(bool((wait.result() == world.size).all()) for wait in waits)
    assert world._signs[world.rank].marks[shared._WAITS] == 0


def nobody_waits(world: Any) -> None:
    """For sums that are looked at only, or given up with all that belongs to them."""
    room = world.room("room", 1000, torch.float32, CPU)
    begun = world.allreduce_async(room.fill_(1), "sum")
    while not begun.done:
        time.sleep(0.001)
    assert bool((room == world.size).all())
    most = 0
    for number in range(20):
        model = torch.nn.Linear(30, 30)
        opt = hvd_lb.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
        model(torch.ones(2, 30)).sum().backward()
        del model, opt
        gc.collect()
        most = max(most, len(world._rooms))
        assert number < 2 or most < 8, most


def sent_to_others(world: Any) -> None:
    """A gradient is pickled as any other tensor is."""
    model = torch.nn.Linear(3, 3)
    opt = hvd_lb.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    model(torch.ones(2, 3)).sum().backward()
    opt.synchronize()
    grad = model.weight.grad
    assert grad is not None
    assert not grad.is_shared()
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(grad)
    assert queue.get().equal(grad)
    opt.step()


def few_descriptors(world: Any) -> None:
    """Those of rooms are closed when all have found them; where there is none left, what to do is said."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for number in range(100):
        room = world.room(f"room {number}", 10, torch.float32, CPU)
        world.allreduce(room.fill_(1), "sum")
    try:
        rooms = [world.room(f"one of many {number}", 10, torch.float32, CPU) for number in range(100)]
    except UserError as error:
        print(error, flush=True)
    else:
        raise AssertionError(len(rooms))


def ends_early(world: Any) -> None:
    """The last one has not begun when another one ends."""
    room = world.room("room", 10, torch.float32, CPU)
    if world.rank == 0:
        world.allreduce_async(room, "sum")
        sys.exit(0)
    time.sleep(1)


def by_engine(world: World) -> None:
    """Why it may be that, for all of them: the tests know."""
    print(f"rank {world.rank} has a {type(world).__name__}", flush=True)
    room = world.room("room", 10, torch.float32, CPU)
    assert world.allreduce(room.fill_(1), "sum").tolist() == [world.size] * 10


if "blind" in sys.argv[3:] and (os.environ.get("HOROVOD_RANK") or os.environ["RANK"]) == "1":

    def refused(*_: Any) -> Segment:
        raise PermissionError("not into others")

    Segment.of_process = refused  # type: ignore[method-assign, assignment]
what: Callable[[Any], None] = globals()[sys.argv[2]]
joined = hvd_lb.init(sys.argv[1])  # type: ignore[arg-type]
assert what is by_engine or isinstance(joined, SharedMemoryWorld), joined
what(joined)
with suppress(ExchangeError):
    hvd_lb.shutdown()
print("ended as it should", flush=True)
