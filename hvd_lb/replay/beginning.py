"""What a run begins with: the first record of its chain (`hvd_lb.exact.chain`)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from hvd_lb.data.images import images_of
from hvd_lb.plan.samples import SamplePlan
from hvd_lb.recipe import Recipe
from hvd_lb.training.checkpoint import Checkpoint


def beginning(
    recipe: Recipe, plan: SamplePlan, fingerprint: str, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Recipe, images and plan of a run on data of this `fingerprint`; `step` is -1, or the last of `checkpoint`'s.

    A run that begins at a checkpoint, of another one, has in `from` the checksum of that.
    """
    record = {
        "epoch": 0 if checkpoint is None else (checkpoint.step - 1) // plan.steps_per_epoch,
        "step": -1 if checkpoint is None else checkpoint.step - 1,
        "recipe": recipe.mathematics(),
        "data": images_of(fingerprint),
        "plan": plan_of(plan),
    }
    return record if checkpoint is None else {**record, "from": checkpoint.state["checksums"]}


def plan_of(plan: SamplePlan) -> dict[str, Any]:
    """Who sees what: the numbers that the plan is made of, and a digest of the image ids of the first step, int64."""
    ids = [plan.image_ids(0, 0, worker) for worker in range(plan.workers)]
    order = hashlib.sha256(np.concatenate(ids).astype("<i8").tobytes())
    return {
        "images": plan.images,
        "workers": plan.workers,
        "per_worker": plan.per_worker,
        "steps_per_epoch": plan.steps_per_epoch,
        "last_batch": plan.last_batch,
        "first_step": order.hexdigest(),
    }
