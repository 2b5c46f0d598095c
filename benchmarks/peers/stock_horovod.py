"""Horovod's own DistributedOptimizer, as its documentation has it."""

import itertools
from collections.abc import Callable

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from steps import CLASSES, Case, time_cases
from torchvision.models import get_model

made = itertools.count()


def make(case: Case) -> Callable[[], object]:
    model = get_model(case.model, num_classes=CLASSES).to(memory_format=case.layout)
    number = next(made)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=1e-4, nesterov=True),
        named_parameters=[(f"{number}.{name}", p) for name, p in model.named_parameters()],
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    x, y = case.batch()

    def step() -> None:
        optimizer.zero_grad()
        with case.autocast():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


hvd.init()
time_cases(make, hvd.rank())
hvd.shutdown()
