"""A plain script for `torchrun --max-restarts`: DistributedDataParallel, and a checkpoint every 50 steps.

restarted.py FOLDER SECONDS: rank 0 writes the number of each step to FOLDER/steps.txt; who waits for another for so
many seconds gives up. The network is the one that benchmarks/chaos.py gives hvd-lb, and the pictures are of that size.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

from hvd_lb.training.models import build_model

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
rank, size = dist.get_rank(), dist.get_world_size()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
labels = torch.tensor(digits.target)

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
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))
    own = order[rank * 24 : rank * 24 + 24]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(parallel(images[own]), labels[own]).backward()
    optimizer.step()
    step += 1
    if rank == 0:
        with (folder / "steps.txt").open("a") as log:
            log.write(f"{step}\n")
        if step % 50 == 0:
            state = {**model.state_dict(), "step": torch.tensor(step)}
            for number, weight in enumerate(weights):
                state[f"momentum.{number}"] = optimizer.state[weight]["momentum_buffer"]
            save_file(state, folder / "plain.new")
            (folder / "plain.new").rename(file)
