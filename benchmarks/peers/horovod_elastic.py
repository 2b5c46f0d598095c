"""Horovod Elastic as its documentation and its examples have it: TorchState, ElasticSampler, a commit every 10 batches.

horovod_elastic.py FOLDER, for `horovodrun --host-discovery-script`. How many steps the weights have seen is kept beside
them, in a buffer of the network: it goes wherever they go, also where `state.batch` does not.
"""

import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from applied import BATCH, digits, note
from torch.utils.data import DataLoader

from hvd_lb.training.models import build_model

RATE = 0.05 / 4  # of one process

folder = Path(sys.argv[1])
hvd.init()
torch.set_num_threads(1)
data = digits()
model = build_model("resnet8", 10, seed=0)
model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=RATE * hvd.size(), momentum=0.9),
    named_parameters=model.named_parameters(),
)


def on_reset() -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATE * hvd.size()


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    start = hvd.broadcast_object(time.time_ns(), name="start")
    while True:
        for images, labels, ids in DataLoader(data, batch_size=BATCH, sampler=state.sampler):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            model.steps += 1
            state.sampler.record_batch(state.batch, BATCH)
            note(folder, start, int(model.steps), state.epoch, hvd.rank(), ids)
            state.batch += 1
            if state.batch % 10 == 0:
                state.commit()
        state.epoch, state.batch = state.epoch + 1, 0
        state.sampler.set_epoch(state.epoch)
        state.commit()


sampler = hvd.elastic.ElasticSampler(data)
state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0, batch=0)
state.register_reset_callbacks([on_reset])
train(state)
