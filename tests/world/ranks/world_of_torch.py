"""Run by test_torch_distributed.py in every process of a job."""

import os
import signal
import sys
import time
from typing import Any

import torch

import hvd_lb
from hvd_lb.world import torch_distributed

what = sys.argv[1]
if what == "short patience":
    torch_distributed.JOIN_SECONDS = 1
world = hvd_lb.init(engine="torch")
if what == "again":
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
