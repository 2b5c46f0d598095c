"""Whether all processes compute the same bits from the same microbatch: `hvd-lb doctor --selftest` with hosts.

A reproducible run needs that, and other CPUs, GPUs or libraries on one of the hosts break it. What each process
computes is fixed: photographs that are cut out and resized by both loaders, and a forward and backward of a small
ResNet on noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.data.options import LoaderKind
from hvd_lb.doctor.trials import Photographs
from hvd_lb.exact.digest import STATISTICS, tensor_digest
from hvd_lb.exact.reproducible import deterministic_kernels, rounding_environment
from hvd_lb.exact.rounding import rounding_differences
from hvd_lb.plan.augment import Microbatch, RandomWindows
from hvd_lb.training.models import build_model, sum_loss

_MODEL, _IMAGES, _SIDE = "resnet20", 16, 32


class Answer(BaseModel):
    """What a process found: digests of each stage, and what its bits depend on besides."""

    model_config = ConfigDict(frozen=True)

    host: str
    rank: int
    digests: dict[str, str]
    environment: dict[str, Any]


def answer(device: torch.device, host: str, rank: int) -> Answer:
    """That of this process, by one thread; UserError where a loader or kernel is missing."""
    torch.set_num_threads(1)
    loaders: tuple[LoaderKind, ...] = ("dali", "torchvision")
    digests = {f"pixels by {kind}": _pixels(kind, device) for kind in loaders}
    with deterministic_kernels(_MODEL):
        digests |= _computed(device)
    return Answer(host=host, rank=rank, digests=digests, environment=rounding_environment(device.type))


def _pixels(kind: LoaderKind, device: torch.device) -> str:
    images = Photographs()
    ids = np.arange(len(images))
    windows = RandomWindows(seed=0).windows(0, ids, images.widths, images.heights)
    levels = Preprocessing(64, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), antialias=True)
    microbatches = [Microbatch(ids, windows)]
    with open_loader(
        kind, images, microbatches, levels, batch_size=len(ids), device=device, threads=1
    ) as loader:
        return tensor_digest({"pixels": next(loader)[0]})


def _computed(device: torch.device) -> dict[str, str]:
    noise = np.random.default_rng(0).standard_normal((_IMAGES, 3, _SIDE, _SIDE), np.float32)
    model = build_model(_MODEL, 10, seed=0, zero_gamma=False, bn_momentum=0.1).to(device).train()
    initial = tensor_digest(model.state_dict())
    logits = model(torch.from_numpy(noise).to(device))
    sum_loss()(logits, torch.arange(_IMAGES, device=device) % 10).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: b for name, b in model.state_dict().items() if name.endswith(STATISTICS)}
    return {
        "first weights": initial,
        "logits": tensor_digest({"logits": logits}),
        "gradients": tensor_digest(gradients),
        "statistics": tensor_digest(statistics),
    }


def unlike(answers: Sequence[Answer]) -> list[str]:
    """For each process that has other bits than most, which, and what of its surroundings is another."""
    most = {stage: _commonest(answers, stage) for stage in answers[0].digests}
    usual = next(
        (of for of in answers if of.digests == most),
        max(answers, key=lambda of: sum(of.digests.get(stage) == digest for stage, digest in most.items())),
    )
    lines = []
    for of in answers:
        stages = [stage for stage, digest in most.items() if of.digests.get(stage) != digest]
        if stages:
            changes = rounding_differences(usual.environment, of.environment)
            why = "; ".join(changes) or "the same libraries and CPU features, so perhaps faulty"
            lines.append(
                f"rank {of.rank} on {of.host} computes other bits than rank {usual.rank} on {usual.host}: "
                f"{', '.join(stages)} ({why})"
            )
    return lines


def _commonest(answers: Sequence[Answer], stage: str) -> str | None:
    """What most have; of two that equally many have, that of the lowest rank."""
    return Counter(of.digests.get(stage) for of in answers).most_common(1)[0][0]
