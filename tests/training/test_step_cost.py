"""What a step of the trainer costs beside its network's own work, in counts, which are the same on every machine."""

from __future__ import annotations

import collections
import cProfile
import itertools
import pstats
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.exact import fixed_point
from hvd_lb.optim import by_group, parameter_groups
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

# Of these no kernel is launched.
VIEWS = (
    "alias",
    "as_strided",
    "detach",
    "empty",
    "expand",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "t.",
)
VIEWS += ("_reshape_alias", "_unsafe_view", "squeeze", "transpose", "unbind", "unsqueeze", "view")


class Operators(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter[str]()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


def cost(step: Callable[[], object]) -> tuple[int, int]:
    """Operators, and calls of Python and C functions, of one step after two others."""
    step()
    step()
    with Operators() as operators:
        step()
    profile = cProfile.Profile()
    profile.runcall(step)
    return sum(operators.counts.values()), pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


def trainers_step(batch: tuple[Tensor, Tensor], reproducible: bool) -> Callable[[], object]:
    few = ArrayImages(np.zeros((99, 8, 8), np.uint8), np.zeros(99, np.int64), list("ab"), "few")
    recipe = Recipe(
        model="resnet50",
        image_size=32,
        gpus=1,
        per_gpu_batch=2,
        num_classes=2,
        reproducible=reproducible,
        threads=1,
    )
    trainer = Trainer(
        recipe,
        Dataset("few", few, few),
        Solo(),
        device=torch.device("cpu"),
        threads=1,
        observer=SilentObserver(),
    )
    trainer.model.train()

    def step() -> None:
        with trainer.kernels():
            trainer.train_step(itertools.repeat(batch))

    return step


@pytest.mark.slow
def test_launches_and_calls_beside_torchs_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_point, "_CHUNK_ON_CPU", fixed_point._CHUNK)  # as on a GPU
    monkeypatch.setattr(by_group, "_PIECE", 1 << 30)
    batch = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    model = build_model("resnet50", 2, seed=0).train()
    optimizer = torch.optim.SGD(parameter_groups(model), 0.1, 0.9, nesterov=True, foreach=True)

    def plain() -> None:
        F.cross_entropy(model(batch[0]), batch[1], reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    operators, calls = cost(plain)
    for reproducible, most_operators, most_calls in ((False, 1.1, 2.0), (True, 2.0, 3.5)):
        found = cost(trainers_step(batch, reproducible))
        assert found[0] <= most_operators * operators, (reproducible, found, operators)
        assert found[1] <= most_calls * calls, (reproducible, found, calls)
