"""Which images batch norm's statistics are recomputed from before an evaluation (`recompute_bn`).

With large minibatches the running statistics are updated seldom, and early validation errors are noisy (the paper's
Figure 4). Recomputed they are the mean over `recompute_bn` training images with the weights as they are. Which images
these are, and their windows, is a function of seed and step; p plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from hvd_lb.data.decoding.stand_in import sizes
from hvd_lb.data.images import Images
from hvd_lb.plan.augment import Microbatch, Origin, RandomWindows
from hvd_lb.plan.counter import generator_seed
from hvd_lb.plan.hosting import hosted
from hvd_lb.plan.shuffle import Permutation
from hvd_lb.recipe import Recipe


class Recomputation:
    """The microbatches of `recompute_bn` images, as equal as possible and of at most n images; none without it."""

    def __init__(self, recipe: Recipe, train: Images, windows: RandomWindows):
        self.images, self._train = recipe.recompute_bn or 0, train
        self.count = -(-self.images // recipe.per_gpu_batch)
        self._seed = generator_seed(recipe.seed, 3)
        self._windows = replace(windows, seed=self._seed)

    def microbatches(self, epoch: int, step: int, numbers: Iterable[int]) -> Iterator[Microbatch]:
        """Those of these numbers, for an evaluation after `step` steps, the last of them in `epoch`."""
        order = Permutation(len(self._train), self._seed, step)
        draw = partial(self._windows.windows, step)
        for number in numbers:
            positions = hosted(number, self.count, self.images)
            ids = order.slice(positions.start, positions.stop)
            origin = Origin("recompute_bn", epoch, step - 1, number)
            yield Microbatch(ids, draw(ids, *sizes(self._train, ids)), origin, draw)

    def seed(self, step: int, number: int) -> int:
        """Of what the model draws (dropout) in one of them."""
        return generator_seed(self._seed, step, number)
