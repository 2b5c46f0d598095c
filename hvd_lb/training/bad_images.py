"""The account of stand-ins: every one told once, in the order of the plan, and a limit for rotten data.

How many there are is summed over the processes, in a step along with the gradients, so all of them know when there is
something to tell, and all of them stop at the same step, whatever their number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_lb.data.decoding.stand_in import StandIn
from hvd_lb.errors import UserError
from hvd_lb.plan.augment import Origin
from hvd_lb.recipe import Recipe
from hvd_lb.world import World
from hvd_lb.world.gather import gather_bytes

Record = dict[str, Any]


@dataclass
class BadImages:
    """Those of this process since the last `take`, and how many positions of this `epoch` had one on all processes.

    `write` gets records on rank 0 (docs/run-directory.md); without `active` images are not skipped and nothing is
    exchanged.
    """

    world: World
    active: bool
    limit: float
    write: Callable[[Sequence[Record]], None]
    in_epoch: int = 0
    found: list[StandIn] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, world: World, write: Callable[[Sequence[Record]], None]) -> BadImages:
        return cls(world, recipe.on_bad_image == "skip", recipe.max_bad_images, write)

    def record(self, stand_ins: Sequence[StandIn]) -> None:
        self.found += stand_ins

    @property
    def on_stand_ins(self) -> Callable[[Sequence[StandIn]], None] | None:
        """For `open_loader`."""
        return self.record if self.active else None

    def discard(self) -> None:
        """Forget those since the last `take`: their step is taken again."""
        self.found = []

    def take(self) -> list[StandIn]:
        """Those since the last time."""
        taken, self.found = self.found, []
        return taken

    def settle(self) -> int:
        """Tells those since the last `take`, and how many they were on all processes; collective."""
        if not self.active:
            return 0
        found = self.take()
        total = int(self.world.allreduce(torch.tensor([len(found)]), "hvd_lb.bad_images").item())
        self._tell(found, total)
        return total

    def settle_step(self, found: Sequence[StandIn], total: int, *, first: bool, images: int) -> None:
        """Tells those of a training step, `total` on all processes; collective. UserError at the limit.

        The step is the `first` of an epoch of `images` or a later one.
        """
        self._tell(found, total)
        self.in_epoch = total + (0 if first else self.in_epoch)
        self.check(self.in_epoch, images, "training")

    @contextmanager
    def untold(self) -> Iterator[None]:
        """Meanwhile they are counted and not told: of images that are looked at a second time."""
        write, self.write = self.write, lambda records: None
        try:
            yield
        finally:
            self.write = write

    def _tell(self, found: Sequence[StandIn], total: int) -> None:
        if not total:
            return
        lines = [json.dumps(_record(stand_in)) for stand_in in found]
        parts = gather_bytes(self.world, "\n".join(lines).encode(), "hvd_lb.bad_images.records")
        if self.world.rank == 0:
            records = [json.loads(line) for part in parts for line in part.splitlines()]
            self.write(sorted(records, key=lambda record: (record["worker"], record["position"])))

    def check(self, bad: int, images: int, what: str) -> None:
        """UserError when so many of the images are more than the limit allows."""
        if bad > self.limit * images:
            raise UserError(
                f"{bad:,} of the {images:,} {what} images cannot be decoded, more than --max-bad-images "
                f"{self.limit:g} allows; bad_images.jsonl in the run directory names them, hvd-lb data verify finds all"
            )


def _record(stand_in: StandIn) -> Record:
    origin = stand_in.origin or Origin("train", 0, 0, 0)
    return {
        "of": origin.of,
        "epoch": origin.epoch,
        "step": origin.step,
        "worker": origin.number,
        "position": stand_in.position,
        "image": stand_in.image,
        "path": stand_in.path,
        "reason": stand_in.reason,
        "stand_in": stand_in.stand_in,
        "stand_in_path": stand_in.stand_in_path,
    }
