"""PyTorch's DistributedDataParallel over Gloo, as its documentation has it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from steps import CLASSES, Case, time_cases
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import get_model


def make(case: Case) -> Callable[[], object]:
    model = DistributedDataParallel(get_model(case.model, num_classes=CLASSES).to(memory_format=case.layout))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=1e-4, nesterov=True)
    x, y = case.batch()

    def step() -> None:
        optimizer.zero_grad()
        with case.autocast():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


dist.init_process_group("gloo")
time_cases(make, dist.get_rank())
dist.destroy_process_group()
