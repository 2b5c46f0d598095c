"""A plain script for `torchrun --max-restarts`: DistributedDataParallel, and a checkpoint every 50 steps.

restarted.py FOLDER SECONDS: who waits for another for so many seconds gives up.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from applied import BATCH, IMAGES, digits, note
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from hvd_lb.training.models import build_model

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
rank, size = dist.get_rank(), dist.get_world_size()
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
data = digits()

model = build_model("resnet8", 10, seed=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
weights = list(model.parameters())
file, step = folder / "plain.safetensors", 0
if file.exists():
    saved = load_file(file)
    step = int(saved.pop("step"))
    for number, weight in enumerate(weights):
        optimizer.state[weight]["momentum_buffer"] = saved.pop(f"momentum.{number}")
    model.load_state_dict(saved)
parallel = DistributedDataParallel(model)

while True:
    epoch, batch = divmod(step, IMAGES // (BATCH * size))
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
    images, labels, ids = data[order[(batch * size + rank) * BATCH :][:BATCH]]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(parallel(images), labels).backward()
    optimizer.step()
    step += 1
    note(folder, start, step, epoch, rank, ids)
    if rank == 0 and step % 50 == 0:
        state = {**model.state_dict(), "step": torch.tensor(step)}
        for number, weight in enumerate(weights):
            state[f"momentum.{number}"] = optimizer.state[weight]["momentum_buffer"]
        save_file(state, folder / "plain.new")
        (folder / "plain.new").rename(file)
