"""Exact evaluation: every validation image counted once, for any number of processes (docs/design.md 8).

Images are cut into batches that do not depend on p, and the processes share the batches. Counts are added up, never
means; losses are added up in the order of the batches, wherever they were computed, so that the sum does not depend on
p even in its last bit. Validation images that cannot be decoded and may be skipped are left out and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from hvd_lb import arithmetic
from hvd_lb.data.decoding.stand_in import sizes
from hvd_lb.data.images import Images
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import Loaders
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import CentreWindows, Microbatch, Origin, Windows
from hvd_lb.plan.hosting import hosted
from hvd_lb.recipe import Recipe
from hvd_lb.training.bad_images import BadImages
from hvd_lb.world import Handle, World

_LEFT_OUT = -1


class Stopped(Exception):  # noqa: N818 - not an error: how an evaluation is given up
    """The run shall end, by the signal `number`; raised on all processes alike."""

    def __init__(self, number: int):
        self.number = number


@dataclass(frozen=True)
class Evaluation:
    """Errors in per cent, mean loss (without label smoothing), and the number of images they are over.

    Those of `ema_…` are of the averaged weights, over the same images.
    """

    top1_error: float
    top5_error: float
    loss: float
    images: int
    ema_top1_error: float | None = None
    ema_top5_error: float | None = None
    ema_loss: float | None = None

    def with_averaged(self, other: Evaluation) -> Evaluation:
        """And the figures of `other` as those of the averaged weights."""
        return replace(
            self,
            ema_top1_error=other.top1_error,
            ema_top5_error=other.top5_error,
            ema_loss=other.loss,
        )

    def figures(self) -> dict[str, Any]:
        """For records: without averages where there are none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def open_loaders(
    recipe: Recipe, images: Images, size: int, device: torch.device, threads: int, bad_images: BadImages
) -> Loaders:
    """Loaders of a run's microbatches of `images` for a network that sees `size` pixels, with so many threads."""
    return Loaders(
        recipe.loader,
        images,
        Preprocessing(size, recipe.mean, recipe.std, recipe.antialias),
        batch_size=recipe.per_gpu_batch,
        device=device,
        threads=threads,
        memory_format=arithmetic.memory_format(recipe),
        read_threads=recipe.read_threads,
        prefetch=recipe.prefetch,
        max_pixels=recipe.max_pixels,
        on_stand_ins=bad_images.on_stand_ins,
    )


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on the images of `loaders`, cut centrally, in batches of the size of these."""

    loaders: Loaders
    windows: CentreWindows
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    bad_images: BadImages

    @classmethod
    def of(
        cls, recipe: Recipe, images: Images, device: torch.device, threads: int, bad_images: BadImages
    ) -> Self:
        """That of a run of this recipe."""
        return cls(
            open_loaders(recipe, images, recipe.evaluation_size, device, threads, bad_images),
            recipe.centre_windows(),
            device,
            arithmetic.dtype(recipe),
            arithmetic.memory_format(recipe),
            bad_images,
        )

    def own(self, rank: int, processes: int) -> range:
        """Numbers of the batches of process `rank`."""
        return hosted(rank, processes, -(-len(self.loaders.images) // self.loaders.batch_size))

    def batches(self, rank: int, processes: int, origin: Origin) -> Iterator[Microbatch]:
        """The batches of process `rank`."""
        images, size = self.loaders.images, self.loaders.batch_size
        for batch in self.own(rank, processes):
            ids = np.arange(batch * size, min((batch + 1) * size, len(images)))
            windows = self.windows.windows(*sizes(images, ids))
            yield Microbatch(ids, windows, replace(origin, number=batch), self._draw)

    def _draw(self, ids: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> Windows:
        return self.windows.windows(widths, heights)

    @torch.no_grad()
    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        world: World,
        autocast: AbstractContextManager[None],
        origin: Origin,
        before_batch: Callable[[int, int], int] = lambda done, of: 0,
    ) -> Evaluation:
        """Collective; `forward` is a model in evaluation mode, `origin` says after which step.

        `before_batch` is told how many of this process's batches are done, and of how many: when it gives a signal's
        number on any process, `Stopped`.
        """
        own = self.own(world.rank, world.size)
        # What is asked before a batch is answered before the next; by all processes, so only while all have batches.
        rounds = len(self.own(0, 1)) // world.size
        asked: Handle | None = None
        # One row a batch (right, right among five, images, loss), 0 for those of other processes: adding 0 is exact.
        figures = torch.zeros(len(self.own(0, 1)), 4, dtype=torch.float64, device=self.device)
        with autocast, self.loaders.open(self.batches(world.rank, world.size, origin)) as loader:
            for done, (batch, (x, y)) in enumerate(zip(own, loader, strict=True)):
                self._heed(asked)
                wish = torch.tensor([before_batch(done, len(own))])
                asked = world.maximum_async(wish, "hvd_lb.evaluation.stop") if done < rounds else None
                bad = [of.position for of in self.bad_images.found if of.origin and of.origin.number == batch]
                if bad:
                    y[bad] = _LEFT_OUT  # a stand-in only fills the batch
                logits = forward(x.to(self.dtype, memory_format=self.memory_format)).double()
                ranked = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                loss = nn.functional.cross_entropy(logits, y, reduction="sum", ignore_index=_LEFT_OUT)
                right = torch.stack([ranked[:, 0].sum(), ranked.any(dim=1).sum()])
                figures[batch, :2], figures[batch, 2], figures[batch, 3] = right, len(y) - len(bad), loss
        self._heed(asked)
        world.allreduce(figures, "hvd_lb.evaluation")
        left_out = self.bad_images.settle()
        self.bad_images.check(left_out, len(self.loaders.images), "validation")
        top1, top5, count, loss_sum = figures.sum(0).tolist()
        if not count:
            raise UserError(
                "none of the images to evaluate on could be decoded: hvd-lb data verify names them"
            )
        return Evaluation(100 * (1 - top1 / count), 100 * (1 - top5 / count), loss_sum / count, int(count))

    def _heed(self, asked: Handle | None) -> None:
        if asked and (number := int(asked.wait())):
            self.bad_images.discard()
            raise Stopped(number)
