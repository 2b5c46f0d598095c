"""Run by test_cut_in_a_message.py in every process of a job: how long it takes to leave a world in mid-message."""

import os
import sys
import threading
import time
from contextlib import suppress

import torch

from hvd_lb.errors import ExchangeError
from hvd_lb.world import abandon, cut, init

engine, seconds = sys.argv[1], float(sys.argv[2])
world = init(engine, may_be_cut=True)
numbers = torch.ones(100_000_000)  # 400 MB in one message: some tenths of a second


def broadcast() -> None:
    with suppress(ExchangeError, RuntimeError):
        world.broadcast(numbers, "numbers")
        print("WHOLE", flush=True)


world.barrier()
threading.Thread(target=broadcast, daemon=True).start()
time.sleep(seconds)
began = time.monotonic()
cut()
abandon()
print(f"LEFT {time.monotonic() - began:.3f}", flush=True)
os._exit(0)  # horovodrun's own end waits for the others
