"""What classes weigh in the loss, and an order of images in which each class comes equally often.

Both are for data in which classes differ in size: balanced weights leave the images as they are and change the loss,
balanced sampling changes which images are seen. Pure functions of labels, seed, epoch and position; p appears nowhere.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from hvd_lb.errors import UserError
from hvd_lb.plan.counter import generator_seed
from hvd_lb.plan.shuffle import Permutation


def drawn_of_classes(labels: np.ndarray, classes: int, sampling: str) -> np.ndarray:
    """How often each class is drawn, to a factor, int64 (classes,)."""
    drawn = np.bincount(labels, minlength=classes)
    return (drawn > 0).astype(np.int64) if sampling == "balanced" else drawn


def class_weights(
    given: str | tuple[float, ...], drawn: np.ndarray, outputs: int | None = None
) -> np.ndarray:
    """Of each output, float64, with a mean of 1 over what is `drawn` (so many images of each class): the gradient keeps
    its scale, and the sum over a step is still divided by its images.

    "balanced": inverse to how often a class is drawn, and 0 where it never is; else these numbers, scaled. Outputs
    beyond the classes have 0. UserError for another word.
    """
    if isinstance(given, str) and given != "balanced":
        raise UserError(f"class_weights {given!r}: expected balanced, or a number for each class")
    weights = 1.0 / np.maximum(drawn, 1) * (drawn > 0) if isinstance(given, str) else np.array(given)
    if not weights[drawn > 0].any():
        raise UserError("class_weights: all images are of classes of weight 0; expected some above 0")
    weights = np.ldexp(weights, -np.frexp(weights.max())[1])  # or a sum might be too large for a number
    weights = weights * (drawn.sum() / (weights @ drawn))
    return np.pad(weights, (0, (outputs or len(weights)) - len(weights)))


class Balanced:
    """Positions of an epoch to images, so that each class has as many of the positions as any other, but for 1.

    Within a class no image comes again before all others have come: the images of a small class several times an epoch,
    those of a large one every few epochs. `labels` are of all images, int64 (N,), and an epoch has N positions.
    """

    def __init__(self, labels: np.ndarray, seed: int):
        self._seed = seed
        self.classes, self.sizes = np.unique(labels, return_counts=True)
        self._members = np.argsort(labels, kind="stable")
        self._starts = np.cumsum(self.sizes) - self.sizes

    @property
    def images(self) -> int:
        return len(self._members)

    @cached_property
    def quotas(self) -> np.ndarray:
        """Positions of each of `classes` in an epoch, int64."""
        each, rest = divmod(self.images, len(self.classes))
        return each + (np.arange(len(self.classes)) < rest)

    def __call__(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image ids at these positions of an epoch, and how often each has come before in the run, both int64 (b,)."""
        slots = _permutation(self.images, self._seed, epoch)(positions)
        turns, of = np.divmod(slots, len(self.classes))
        times, places = np.divmod(epoch * self.quotas[of] + turns, self.sizes[of])
        ids = np.empty(len(slots), np.int64)
        for one, again in sorted(set(zip(of.tolist(), times.tolist(), strict=True))):
            here = np.flatnonzero((of == one) & (times == again))
            order = _permutation(int(self.sizes[one]), generator_seed(self._seed, one), again)
            ids[here] = self._members[self._starts[one] + order(places[here])]
        return ids, times


@lru_cache(maxsize=4096)
def _permutation(size: int, seed: int, number: int) -> Permutation:
    return Permutation(size, seed, number)
