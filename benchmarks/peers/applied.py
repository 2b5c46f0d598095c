"""What the peers of benchmarks/chaos.py share: images, and a log of those that the weights have seen, in which step.

The images are 1,728 of the digits: whole minibatches, on 1, 2, 3 and 4 processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

IMAGES, BATCH = 1728, 24


def digits() -> TensorDataset:
    """Pictures of the size that hvd-lb's are, labels, and the number of each."""
    loaded = load_digits()
    images = torch.tensor(loaded.images[:IMAGES], dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    return TensorDataset(images, torch.tensor(loaded.target[:IMAGES]), torch.arange(IMAGES))


def note(folder: Path, start: int, step: int, epoch: int, rank: int, ids: Iterable[Tensor]) -> None:
    """One write for each process and step, so lines of several do not mix; `start` grows when steps begin anew."""
    numbers = ",".join(str(int(number)) for number in ids)
    with (folder / "applied.txt").open("a") as log:
        log.write(f"{start} {step} {epoch} {rank} {os.getpid()} {numbers}\n")
