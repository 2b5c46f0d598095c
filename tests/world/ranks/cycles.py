"""The last rank prints how many of Horovod's cycles a sum takes, of all at once and of itself after the others."""

import json
import os
import statistics
import time

import torch

import hvd_lb as lb

CYCLE = float(os.environ["HOROVOD_CYCLE_TIME"]) / 1000  # seconds
world, tensor = lb.init(), torch.ones(4)
world.allreduce(tensor, "a")
taken, late = [], []
for _ in range(7):
    began = time.perf_counter()
    world.allreduce(tensor, "a")
    taken.append((time.perf_counter() - began) / CYCLE)
for _ in range(3):
    world.barrier()
    if world.rank:
        time.sleep(CYCLE / 4)
    began = time.perf_counter()
    world.allreduce(tensor, "a")
    late.append((time.perf_counter() - began) / CYCLE)
if world.rank == world.size - 1:
    print("CYCLES " + json.dumps([statistics.median(taken), statistics.median(late)]), flush=True)
lb.shutdown()
