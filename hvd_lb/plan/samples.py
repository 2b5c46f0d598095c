"""Which images virtual worker j sees in step t of epoch e: a function of the recipe (remark 4; docs/design.md 5).

Number of processes, hosts and devices appear nowhere. By default each image has one position of an epoch. With
`balanced` each class has equally many (`hvd_lb.plan.classes`). With `repeats`, R, a step has each of its images R times
(repeated augmentation: Hoffer et al. 2020, arXiv 1901.09335; Berman et al. 2019, arXiv 1902.05509): an epoch still has
N positions, and R epochs show every image once, R times each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from hvd_lb.errors import UserError, one_of, whole
from hvd_lb.plan.hosting import hosted

if TYPE_CHECKING:
    import numpy as np

    from hvd_lb.plan.classes import Balanced
    from hvd_lb.plan.shuffle import Permutation

LastBatch = Literal["drop", "keep"]

# A draw's key is that of the image, and which of its occurrences this is above so many bits.
_OCCURRENCE = 40


@dataclass(frozen=True)
class SamplePlan:
    """The plan of `images` images (N) for `workers` virtual workers (k) of `per_worker` images (n) a step.

    The rest of an epoch that fills no step is left out by the `last_batch` "drop", and a step of its own by "keep",
    spread evenly. `UserError`, a `ValueError`, for values that make no plan, as a minibatch larger than the data set
    where the rest is dropped.
    """

    images: int
    workers: int
    per_worker: int
    seed: int
    last_batch: LastBatch = "drop"
    repeats: int = 1
    balanced: Balanced | None = field(default=None, compare=False)
    begin: int = 0  #: images of the epoch that are used before the first step (`hvd_lb.plan.run_plan`)

    def __post_init__(self) -> None:
        for name, least in (
            ("images", 1),
            ("workers", 1),
            ("per_worker", 1),
            ("seed", 0),
            ("repeats", 1),
            ("begin", 0),
        ):
            whole(name, getattr(self, name), least)
        one_of("last_batch", self.last_batch, get_args(LastBatch))
        if self.begin and self.repeats > 1:
            raise ValueError("repeated images are numbered by whole epochs of one plan")
        if self.repeats > self.global_batch:
            raise UserError(
                f"repeats {self.repeats}, but a minibatch has {self.global_batch} images: "
                "expected at most as many"
            )
        if self.last_batch == "drop" and self.global_batch > self.images:
            largest = self.images // self.per_worker
            fix = (
                f"use at most {largest} workers at {self.per_worker} images each"
                if largest
                else f"use at most {self.images} images per worker"
            )
            raise UserError(
                f"a minibatch of {self.workers} × {self.per_worker} = {self.global_batch} images, "
                f"but the data set has {self.images}: {fix}, or last_batch keep"
            )

    @property
    def global_batch(self) -> int:
        """Images of a full step, kn."""
        return self.workers * self.per_worker

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.images - self.begin, self.global_batch)
        return full + (self.last_batch == "keep" and rest > 0)

    @property
    def dropped_per_epoch(self) -> int:
        """Images of an epoch that fill no step and are left out (0 with `keep`)."""
        return max(0, self.images - self.begin - self.steps_per_epoch * self.global_batch)

    def step_images(self, step: int) -> int:
        """Images of step `step` of an epoch: B, the normaliser of its gradient (paper remark 3)."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self.steps_per_epoch}")
        return min(self.global_batch, self.images - self.begin - step * self.global_batch)

    def positions(self, step: int, worker: int) -> range:
        """Positions of virtual worker `worker` in an epoch's permutation: the `worker`-th n of the step's kn.

        A short last step is spread evenly: workers get counts that differ by at most one, some of them none.
        `ValueError` for a step or worker that there is not.
        """
        if not 0 <= worker < self.workers:
            raise ValueError(f"worker {worker} of {self.workers}: expected 0 to {self.workers - 1}")
        start = self.begin + step * self.global_batch
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
        return self.draws(epoch, step, worker)[0]

    def draws(self, epoch: int, step: int, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """`image_ids`, and for each a key, int64 (n,), that no other occurrence of the image has in this epoch: for
        what is drawn at random for it. Where images have one occurrence it is their id.
        """
        import numpy as np  # as below

        positions = self.positions(step, worker)
        if self.repeats == 1:
            ids, times = self._ids(epoch, np.arange(positions.start, positions.stop))
            return ids, ids + (times << _OCCURRENCE)
        copies, places = np.divmod(
            np.arange(positions.start, positions.stop) - step * self.global_batch, self._distinct(step)
        )
        # All distinct images of a run are numbered through, so that none comes again before the others have come.
        before = epoch * self.distinct_per_epoch + step * self._distinct(0)
        passes, places = np.divmod(before + places, self.images)
        ids, times = np.empty_like(places), np.empty_like(places)
        for one in np.unique(passes).tolist():
            ids[passes == one], times[passes == one] = self._ids(one, places[passes == one])
        times = times if self.balanced else passes
        return ids, ids + ((times * self.repeats + copies) << _OCCURRENCE)

    @property
    def distinct_per_epoch(self) -> int:
        """Different images of an epoch, but for those that a repeated one shows again."""
        last = self.steps_per_epoch - 1
        return last * self._distinct(0) + self._distinct(last)

    def _distinct(self, step: int) -> int:
        """Different images of a step."""
        return -(-self.step_images(step) // self.repeats)

    def _ids(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image ids at positions of an epoch, and how often each has come before in the run, as far as that matters."""
        if self.balanced:
            return self.balanced(epoch, positions)
        ids = _permutation(self.images, self.seed, epoch)(positions)
        return ids, ids * 0


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Permutation:
    from hvd_lb.plan.shuffle import Permutation  # needs numpy, which --help does not

    return Permutation(size, seed, epoch)
