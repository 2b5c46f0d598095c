"""Which images virtual worker j sees in step t of epoch e: a function of the recipe (remark 4; docs/design.md 5).

Number of processes, hosts and devices appear nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from hvd_lb.errors import UserError
from hvd_lb.plan.hosting import hosted

if TYPE_CHECKING:
    import numpy as np

    from hvd_lb.plan.shuffle import Permutation

LastBatch = Literal["drop", "keep"]


@dataclass(frozen=True)
class SamplePlan:
    """The plan of `images` images (N) for `workers` virtual workers (k) of `per_worker` images (n) a step."""

    images: int
    workers: int
    per_worker: int
    seed: int
    last_batch: LastBatch = "drop"

    def __post_init__(self) -> None:
        if min(self.images, self.workers, self.per_worker) < 1:
            raise ValueError(f"{self}: images, workers and per_worker must be at least 1")
        if self.last_batch == "drop" and self.global_batch > self.images:
            largest = self.images // self.per_worker
            fix = (
                f"use at most {largest} GPUs at {self.per_worker} images each"
                if largest
                else f"use at most {self.images} images per GPU"
            )
            raise UserError(
                f"a minibatch of {self.workers} × {self.per_worker} = {self.global_batch} images, "
                f"but the data set has {self.images}: {fix}, or --last-batch keep"
            )

    @property
    def global_batch(self) -> int:
        """Images of a full step, kn."""
        return self.workers * self.per_worker

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.images, self.global_batch)
        return full + (self.last_batch == "keep" and rest > 0)

    @property
    def dropped_per_epoch(self) -> int:
        """Images of an epoch that fill no step and are left out (0 with `keep`)."""
        return max(0, self.images - self.steps_per_epoch * self.global_batch)

    def step_images(self, step: int) -> int:
        """Images of step `step` of an epoch: B, the normaliser of its gradient (paper remark 3)."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self.steps_per_epoch}")
        return min(self.global_batch, self.images - step * self.global_batch)

    def positions(self, step: int, worker: int) -> range:
        """Positions of virtual worker `worker` in an epoch's permutation: the `worker`-th n of the step's kn.

        A short last step is spread evenly: workers get counts that differ by at most one, some of them none.
        """
        start = step * self.global_batch
        own = hosted(worker, self.workers, self.step_images(step))
        return range(start + own.start, start + own.stop)

    def active_workers(self, step: int) -> int:
        """Virtual workers with images in this step: k_t, over which batch norm statistics are averaged."""
        return min(self.workers, self.step_images(step))

    @property
    def smallest_microbatch(self) -> int:
        """Images of the smallest microbatch that is not empty."""
        last = self.step_images(self.steps_per_epoch - 1)
        return max(1, last // self.workers)

    def image_ids(self, epoch: int, step: int, worker: int) -> np.ndarray:
        """Image ids of one microbatch, int64 (n,); shorter, perhaps empty, in a short last step."""
        positions = self.positions(step, worker)
        return _permutation(self.images, self.seed, epoch).slice(positions.start, positions.stop)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Permutation:
    from hvd_lb.plan.shuffle import Permutation  # needs numpy, which --help does not

    return Permutation(size, seed, epoch)
