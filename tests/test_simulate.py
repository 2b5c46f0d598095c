"""A rehearsal keeps to its budget: whole steps, or microbatches, or a few images, and says which."""

import time

import torch

from hvd_lb.resolve import resolve
from hvd_lb.simulate import Rehearsal, rehearse


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
