"""The network's own work and torch's SGD in each of two processes, and no exchange: what no trainer can beat."""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from steps import CLASSES, Case, time_cases
from torchvision.models import get_model


def make(case: Case) -> Callable[[], object]:
    model = get_model(case.model, num_classes=CLASSES).to(memory_format=case.layout)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=1e-4, nesterov=True)
    x, y = case.batch()

    def step() -> None:
        optimizer.zero_grad()
        with case.autocast():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


time_cases(make, int(os.environ["RANK"]))
