"""Run by test_cut_in_a_message.py in every process of a job: how long it takes to leave a world in mid-message."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from hvd_lb.errors import ExchangeError
from hvd_lb.world import abandon, cut, init

os.environ["HVD_LB_SHARED_MEMORY"] = "0"  # the engine's own world
engine, seconds = sys.argv[1], float(sys.argv[2])
world = init(engine, may_be_cut=True)
root = float(world.rank == 0)
numbers = torch.full((100_000_000,), root)  # 400 MB in one message: some tenths of a second
leaves, left = threading.Event(), threading.Event()
wait_for = world._lines.wait_for


def wait_and_see_late(done: Callable[[], bool], *what: str) -> None:
    """What ended as the world was left is looked at when nothing of it is there any more."""
    wait_for(done, *what)
    if leaves.is_set():
        left.wait()


def broadcast() -> None:
    with suppress(ExchangeError, RuntimeError):
        while True:
            world.broadcast(numbers, "numbers")
            if not bool((numbers == 1).all()):
                print("BROKEN", flush=True)
            numbers.fill_(root)


world._lines.wait_for = wait_and_see_late
world.barrier()
time.sleep(0.5)  # who is late has left the barrier, too
thread = threading.Thread(target=broadcast)
thread.start()
time.sleep(seconds)
leaves.set()
began = time.monotonic()
cut()
abandon()
print(f"LEFT {time.monotonic() - began:.3f}", flush=True)
left.set()
thread.join()
os._exit(0)  # horovodrun's own end waits for the others
