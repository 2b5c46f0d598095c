"""What all sides of end_to_end.py have in common: the cases, their batches, and the clock."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import get_model

CLASSES = 1000
WARM_UP = 2
# A folder of pictures to train on, else a batch lies ready.
PICTURES = os.environ.get("HVD_LB_BENCH_PICTURES")


@dataclass(frozen=True)
class Case:
    """A network, the images that each process gives it in a step, and how many steps are timed."""

    model: str
    pixels: int
    images: int
    steps: int
    bf16: bool = False

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.bf16 else torch.contiguous_format

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()

    def batch(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x = torch.randn(self.images, 3, self.pixels, self.pixels)
        return x.to(memory_format=self.layout), torch.randint(0, CLASSES, (self.images,))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The one that lies ready, again and again; or pictures, by a worker process, as PyTorch's ImageNet example."""
        if PICTURES is None:
            return itertools.repeat(self.batch())
        augment = transforms.Compose(
            [
                transforms.RandomResizedCrop(self.pixels),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        images = ImageFolder(f"{PICTURES}/train", augment)
        endless = RandomSampler(images, replacement=True, num_samples=10**9)
        loader = DataLoader(images, self.images, sampler=endless, num_workers=1)
        return ((x.to(memory_format=self.layout), y) for x, y in loader)


def network(case: Case) -> nn.Module:
    return get_model(case.model, num_classes=CLASSES).to(memory_format=case.layout)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=1e-4, nesterov=True)


def plain_step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """A step as torch's documentation has it."""
    batches = case.batches()

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        with case.autocast():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


CASES = {
    "resnet18 224² bf16": Case("resnet18", 224, 16, steps=6, bf16=True),
    "resnet18 224²": Case("resnet18", 224, 16, steps=4),
    "resnet18 64²": Case("resnet18", 64, 16, steps=20),
    "squeezenet1_1 64²": Case("squeezenet1_1", 64, 16, steps=40),
    "mobilenet_v3_small 128² bf16": Case("mobilenet_v3_small", 128, 16, steps=20, bf16=True),
}


def time_cases(make: Callable[[Case], Callable[[], object]], rank: int) -> None:
    """Times the steps that `make` makes, of each case named on the command line.

    Prints on rank 0, each for one step: the median seconds; the median CPU seconds of this process, its threads for the
    exchange included; and the most memory that this process had meanwhile, in bytes.
    """
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        step = make(CASES[name])
        seconds, cpu_seconds = list[float](), list[float]()
        for _ in range(WARM_UP + CASES[name].steps):
            began, cpu_began = time.perf_counter(), time.process_time()
            step()
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(time.process_time() - cpu_began)
        status = Path("/proc/self/status").read_text()
        memory = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        figures = [statistics.median(values[WARM_UP:]) for values in (seconds, cpu_seconds)]
        if rank == 0:
            print("CASE", json.dumps([name, *figures, memory]), flush=True)
        del step
