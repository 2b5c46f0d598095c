"""The trainer's own step, and its own loader where there are pictures.

Further words in HVD_LB_BENCH are fields of its recipe, as JSON.
"""

import itertools
import json
import os
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from steps import CLASSES, PICTURES, Case, time_cases

import hvd_lb as lb
from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training.trainer import Trainer

FEW = ArrayImages(np.zeros((8192, 8, 8), np.uint8), np.zeros(8192, np.int64), list("abcdefghij"), "nothing")
DATA = open_dataset(PICTURES) if PICTURES else Dataset("nothing", FEW, FEW)

os.environ.setdefault("HOROVOD_CYCLE_TIME", "10")  # as in `hvd-lb train` on CPUs


def make(case: Case) -> Callable[[], object]:
    recipe = Recipe(
        model=case.model, image_size=case.pixels, num_classes=CLASSES, gpus=lb.current().size,
        per_gpu_batch=case.images, learning_rate=1e-4, threads=1, channels_last=case.bf16,
        precision="bf16" if case.bf16 else "fp32", **json.loads(os.environ.get("HVD_LB_BENCH", "{}")),
    )  # fmt: skip
    trainer = Trainer(
        recipe, DATA, lb.current(), device=torch.device("cpu"), threads=1,
        observer=SilentObserver(),
    )  # fmt: skip
    trainer.model.train()
    batches = STACK.enter_context(trainer.batches()) if PICTURES else itertools.repeat(case.batch())

    def step() -> None:
        with trainer.kernels():
            trainer.train_step(batches)

    return step


with ExitStack() as STACK:
    time_cases(make, lb.init().rank)
lb.shutdown()
