"""Rank of a real Horovod job: a stop that one process hears in an evaluation, and a minibatch that is left out.

`keeping.py FOLDER`: each process leaves FOLDER/RANK.json; checkpoints are those of rank 0.
"""

import json
import math
import sys
from pathlib import Path

import torch

import hvd_lb as lb
from hvd_lb.training.checkpoint import CheckpointStore
from hvd_lb.training.trainer import Trainer
from tests.training.test_trainer import Records, small_data, small_recipe

torch.set_num_threads(1)
world, folder = lb.init(), Path(sys.argv[1])


def trainer(name: str, **changes: object) -> Trainer:
    recipe = small_recipe(
        precision="fp32", reproducible=True, eval_every="1epoch", checkpoint_every="1epoch", **changes
    )
    return Trainer(
        recipe, small_data(), world, device=torch.device("cpu"), threads=1, observer=Records(),
        store=CheckpointStore(folder / name),
    )  # fmt: skip


# Only the last process is told to stop, in the evaluation after the first epoch; its batches are not the fewest.
stopped = trainer("stopped")
asked: list[int] = []
told = world.rank == world.size - 1
stopped.stop_requested = lambda: asked.append(stopped.step) or 15 * (told and asked.count(4) > 0)  # type: ignore[func-returns-value]
stopped.fit()

spoilt = trainer("spoilt", on_nan="rollback")
loss = spoilt.forward.loss


def spoiling(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the virtual workers of rank 0 alone."""
    return loss(logits, labels) * (math.nan if spoilt.step == 5 and world.rank == 0 else 1.0)


spoilt.forward.loss = spoiling
spoilt.fit()

(folder / f"{world.rank}.json").write_text(
    json.dumps(
        {
            "stopped": [stopped.step, stopped.stopped_by, stopped.state.evaluation_due],
            "left_out": sorted(spoilt.state.left_out),
            "steps": spoilt.step,
        }
    )
)
lb.shutdown()
