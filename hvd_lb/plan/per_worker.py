"""An ablation of remark 4: each virtual worker keeps a share of the images and shuffles only that.

The paper has one random shuffling per epoch, divided among all workers. Loaders that shard by process do this instead:
whom an image is computed with is then drawn among fewer minibatches, and whoever keeps the same share computes batch
norm's statistics over it alone. Number of processes, hosts and devices appear nowhere here, either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_lb.plan.hosting import hosted
from hvd_lb.plan.samples import SamplePlan

if TYPE_CHECKING:
    import numpy as np


class PerWorkerPlan(SamplePlan):
    """As SamplePlan in how many images a worker sees in a step, but all of them from its own share.

    A permutation that stays, drawn by the seed, is cut into k contiguous shares that differ by at most one image. Where
    the rest of an epoch is dropped, it is another rest of each share in each epoch.
    """

    def draws(self, epoch: int, step: int, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """Image ids of one microbatch, int64 (n,), twice; shorter, perhaps empty, in a short last step."""
        import numpy as np  # which --help does not need

        from hvd_lb.plan.counter import generator_seed
        from hvd_lb.plan.shuffle import Permutation

        count = len(self.positions(step, worker))
        share = hosted(worker, self.workers, self.images)
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        begin = step * self.per_worker
        within = Permutation(len(share), generator_seed(self.seed, 1, worker), epoch)
        shares = Permutation(self.images, generator_seed(self.seed, 0), 0)
        ids = shares(share.start + within.slice(begin, begin + count))
        return ids, ids
