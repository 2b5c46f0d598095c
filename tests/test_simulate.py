"""A rehearsal keeps to its budget: whole steps, or microbatches, or a few images, and says which."""

import time
from typing import Any

import pytest
import torch

from hvd_lb.recipe import Recipe
from hvd_lb.resolve import resolve
from hvd_lb.simulate import Rehearsal, rehearse
from hvd_lb.training.models import parameter_count
from hvd_lb_cli.simulate import _memory


def rehearsal(gpus: int, budget: float) -> Rehearsal:
    resolved = resolve(
        {"data": "digits", "gpus": gpus, "per_gpu_batch": 8, "epochs": 1, "steps": 2, "warmup": "none"},
        recipe=None,
        default_gpus=1,
    )
    return rehearse(resolved, device=torch.device("cpu"), threads=1, deadline=time.monotonic() + budget)


def test_whole_steps() -> None:
    found = rehearsal(gpus=3, budget=600)
    assert (found.steps, found.microbatches, len(found.losses)) == (2, 6, 2)
    assert found.step_seconds > 0
    assert abs(found.losses[0] - 2.3) < 0.1


def test_without_time_for_a_microbatch() -> None:
    found = rehearsal(gpus=3, budget=-1)
    assert (found.steps, found.microbatches, found.losses, found.probed) == (0, 0, [], 2)
    assert found.step_seconds == 3 * found.microbatch_seconds > 0


@pytest.mark.parametrize(
    ("changes", "numbers", "said"),
    [
        ({}, 12, "weights, gradients and momentum of"),
        ({"optimizer": "lars"}, 12, "weights, gradients and momentum of"),
        ({"optimizer": "lamb"}, 16, "weights, gradients and LAMB's two averages of"),
        ({"ema": 0.9}, 16, "weights, gradients, averaged weights and momentum of"),
        ({"precision": "fp64"}, 24, "weights, gradients and momentum of"),
        ({"reproducible": True}, 20, "weights, gradients, their sums in fixed point and momentum of"),
    ],
)
def test_the_memory_that_a_run_needs_whatever_its_minibatch(
    changes: dict[str, Any], numbers: int, said: str
) -> None:
    """Bytes for each parameter, counted by hand."""
    told = _memory(Recipe(model="resnet20", num_classes=10, **changes))
    parameters = parameter_count("resnet20", 10)
    assert told.startswith(
        f"{numbers * parameters / 1e6:,.0f} MB for {said} {parameters / 1e6:.2f} M parameters, and"
    )
    frozen = _memory(Recipe(model="resnet50", num_classes=1000, freeze="backbone", **changes))
    whole, learning = parameter_count("resnet50", 1000), 2048 * 1000 + 1000
    per_weight = (8 if changes.get("precision") == "fp64" else 4) * (2 if changes.get("ema") else 1)
    assert frozen.startswith(
        f"{(per_weight * whole + (numbers - per_weight) * learning) / 1e6:,.0f} MB for {said} "
    )
    assert f"25.56 M parameters, of which {learning / 1e6:.2f} M learn, and" in frozen
