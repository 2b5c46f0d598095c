"""Run by test_torch_distributed.py in every process of a job."""

import gc
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import torch

import hvd_lb
from hvd_lb.errors import ExchangeError
from hvd_lb.world import abandon, cut, rendezvous, torch_distributed

what = sys.argv[1]
if what == "short patience":
    rendezvous.JOIN_SECONDS = 1
world = hvd_lb.init(engine="torch")
if what == "again":
    gc.disable()  # what a world has opened goes with it, and not some time
    kept, descriptors = [], []
    for _ in range(4):
        # Somebody keeps handles of what was summed, and of what fails.
        kept.append(world.allreduce_async(torch.ones(1), "sum"))
        assert kept[-1].wait().item() == world.size
        world.barrier()
        cut()
        kept.append(world.allreduce_async(torch.ones(1), "sum"))
        with suppress(ExchangeError):
            kept[-1].wait()
        abandon()
        world = hvd_lb.init(engine="torch")
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert len(set(descriptors)) == 1, descriptors
    for _ in range(3):
        hvd_lb.shutdown()
        world = hvd_lb.init()
        assert world.allreduce(torch.ones(1), "sum").item() == world.size
    print("again and again", flush=True)
    hvd_lb.shutdown()
elif what == "killed":
    told = torch_distributed.TorchWorld._told

    def told_slowly(*arguments: Any) -> None:
        """Who waits goes on while Gloo's thread is still in here: it is to be out before the interpreter ends."""
        told(*arguments)
        time.sleep(1)

    torch_distributed.TorchWorld._told = told_slowly  # type: ignore[method-assign]
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.allreduce(torch.ones(1), "sum")
elif what == "raises":
    handle = world.allreduce_async(torch.ones(1), "sum" if world.rank else "another sum")
    if world.rank:
        time.sleep(1)
        raise RuntimeError("mine")
    handle.wait()
