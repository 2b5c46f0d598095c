"""Mixup and CutMix: the arithmetic of the papers with soft labels, and each microbatch's own random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms import v2

from hvd_lb.plan.mixing import Mixing
from hvd_lb.training.models import sum_loss

CLASSES = 5


def microbatch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 3, 12, 20, dtype=torch.float64), torch.randint(0, CLASSES, (6,))


def draws(mixing: Mixing, count: int = 3000) -> np.ndarray:
    return np.array([mixing._beta(mixing.mixup or mixing.cutmix, step, 3) for step in range(count)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_images_and_loss_are_those_of_soft_labels(method: str, smoothing: float) -> None:
    images, labels = microbatch()
    given = images.clone()
    for step in range(20):
        mixed, targets = Mixing(1, **{method: 0.8})(images, labels, step, 2)
        assert torch.equal(images, given), "the loader's own tensor is left alone"
        share = targets.share
        assert 0 <= share <= 1
        if method == "mixup":
            expected = torch.stack([share * images[i] + (1 - share) * images[i - 1] for i in range(6)])
            assert torch.allclose(mixed, expected, atol=1e-15, rtol=0)
        else:
            other = (mixed != images).any(dim=1)
            cut = other.unsqueeze(1).expand_as(mixed)
            assert torch.equal(mixed[cut], torch.stack([images[i - 1] for i in range(6)])[cut])
            assert other.float().mean().item() == pytest.approx(1 - share, abs=1e-6)
        logits = torch.randn(6, CLASSES, dtype=torch.float64)
        soft = torch.stack(
            [
                share * one_hot(labels[i], CLASSES).double()
                + (1 - share) * one_hot(labels[i - 1], CLASSES).double()
                for i in range(6)
            ]
        )
        wanted = cross_entropy(logits, soft, reduction="sum", label_smoothing=smoothing)
        assert targets.loss(sum_loss(smoothing), logits).item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 2.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    """Mean 1/2, variance 1/(4 (2α + 1)), and as many on each side."""
    found = draws(Mixing(0, mixup=alpha))
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(found.mean() - 0.5) < 5 * math.sqrt(variance / len(found))
    assert found.var() == pytest.approx(variance, rel=0.1)
    if alpha < 0.1:  # most are 0 or 1
        return
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    ranks = np.searchsorted(theirs, np.sort(found)) / len(theirs)
    assert np.abs(ranks - (np.arange(len(found)) + 0.5) / len(found)).max() < 1.95 / math.sqrt(len(found))


def test_rectangles_are_as_torchvisions_are() -> None:
    images, labels = microbatch()
    ours = np.array([Mixing(4, cutmix=1.0)(images, labels, step, 0)[1].share for step in range(3000)])
    torch.manual_seed(1)
    cut = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    theirs = np.array([cut.make_params([images])["lam_adjusted"] for _ in range(3000)])
    assert abs(ours.mean() - theirs.mean()) < 6 * theirs.std() / math.sqrt(3000)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.1)


def test_with_both_each_microbatch_has_one_of_them() -> None:
    images, labels = microbatch()
    mixing = Mixing(2, mixup=1.0, cutmix=1.0)
    # mixup leaves no pixel as it was
    cut, of_other = (
        [bool((mixing(images, labels, step, worker)[0] == images).any()) for step in range(400)]
        for worker in (1, 2)
    )
    assert 150 < sum(cut) < 250
    assert 150 < sum(one == other for one, other in zip(cut, of_other, strict=True)) < 250


def test_each_method_has_its_own_share() -> None:
    """Of Beta(0.01, 0.01) half are 1, where nothing is cut out, and of Beta(4, 4) none."""
    images, labels = microbatch()
    mixing = Mixing(2, mixup=4.0, cutmix=0.01)
    shares: dict[bool, list[float]] = {True: [], False: []}
    for step in range(300):
        mixed, targets = mixing(images, labels, step, 1)
        shares[bool((mixed == images).any())].append(targets.share)
    assert 0.4 < np.mean([share == 1 for share in shares[True]]) < 0.6
    assert np.mean([0.02 < share < 0.98 for share in shares[False]]) > 0.9  # of some all is cut out


def test_each_microbatch_has_its_own_and_always_the_same() -> None:
    images, labels = microbatch()
    of = {
        key: Mixing(key[0], mixup=1.0)(images, labels, *key[1:])[1].share
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }
    assert len(set(of.values())) == 4
    assert Mixing(0, mixup=1.0)(images, labels, 0, 1)[1].share == of[0, 0, 1]


def test_without_either_nothing_is_done() -> None:
    images, labels = microbatch()
    mixed, targets = Mixing(0)(images, labels, 0, 0)
    assert mixed is images
    assert targets.others is None
