"""Two ranks, one of which comes late, and then learns a parameter more. Argument: watched, or not."""

import os
import sys
import threading
import time

import torch
from torch import nn

import hvd_lb as lb
from hvd_lb.world.lines import Patience

watched = sys.argv[1] == "watched"
world = lb.init(watched=watched)
world.barrier()
Patience.SECONDS = 0.5
if world.rank == 0:
    time.sleep(2)
world.allreduce(torch.ones(3), "late")
world.barrier()
Patience.SECONDS = 60
model = nn.Linear(2, 2)
model.bias.requires_grad_(False)
opt = lb.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
Patience.SECONDS = 1
if world.rank == 1:
    model.bias.requires_grad_(True)
threading.Timer(2.5, os._exit, [0]).start()
for _ in range(2):
    opt.backward(model(torch.ones(2, 2)).sum())
    opt.step(images=2)
