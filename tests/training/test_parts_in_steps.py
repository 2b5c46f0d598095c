"""What the plan and the loss of today's recipes are in the trainer's own steps: images, windows and gradients."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from test_trainer import make_trainer, small_data, small_recipe
from torch.nn import functional as F  # noqa: N812


def test_copies_of_an_image_are_other_crops() -> None:
    trainer = make_trainer(small_recipe(repeated_augment=4))
    crops = defaultdict(set)
    for worker in range(4):
        batch = trainer.microbatch(5, worker)
        for at, image in enumerate(batch.image_ids.tolist()):
            crops[image].add((batch.windows.x[at], batch.windows.y[at], batch.windows.width[at]))
    assert len(crops) == 8
    assert sum(map(len, crops.values())) > 24  # windows of 8 pixels are alike now and then


def test_a_balanced_epoch() -> None:
    data = small_data()
    few = np.flatnonzero(data.train.labels == 2)[:3]
    labels = np.where(data.train.labels == 2, 0, data.train.labels)
    labels[few] = 2
    data.train.labels = labels
    trainer = make_trainer(small_recipe(sampling="balanced", last_batch="keep", epochs=1), data)
    ids = np.concatenate([batch.image_ids for batch in trainer.microbatches()])
    assert np.bincount(labels[ids]).tolist() == [30] * 5
    assert sorted(np.unique(ids[labels[ids] == 2], return_counts=True)[1]) == [10, 10, 10]


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_the_weighted_loss_and_its_gradient(sampling: str) -> None:
    weights = (0.5, 4.0, 0.0, 1.0, 2.0)
    trainer = make_trainer(small_recipe(class_weights=weights, label_smoothing=0.1, sampling=sampling))
    labels = trainer.dataset.train.labels
    drawn = np.full(5, 30) if sampling == "balanced" else np.bincount(labels)
    scale = 150 / (np.array(weights) @ drawn)
    trainer.model.train()
    with trainer.batches() as batches:
        x, y = next(batches)
        (ours,) = trainer.forward.losses(trainer.step, [0], [(x, y)])
    logits = trainer.model(x.double())
    plain = F.cross_entropy(
        logits, y, torch.tensor(weights, dtype=torch.float64) * scale, reduction="sum", label_smoothing=0.1
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    learning = list(trainer.model.parameters())
    for a, b in zip(torch.autograd.grad(ours, learning), torch.autograd.grad(plain, learning), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
