"""Processes that compute wrongly are found while a run goes on: `--audit`, in the reproducible mode only.

There a microbatch gives the same bits on every process. So in a step that is drawn one is computed a second time by
another process, and digests of its gradient, its batch norm statistics and its loss are compared before the update.
Where they differ, nothing of the step is used: both compute it once more, a third process does if there is one, and
who is alone with a result has computed wrongly. The step is then taken again; what a process still gets wrong is
computed by another one. What is added up between processes, and the update, which every process makes by itself, are
not audited.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hvd_lb.audit.draw import Draw, draw
from hvd_lb.audit.votes import judge
from hvd_lb.world import World
from hvd_lb.world.gather import gather_bytes


class Disagreement(ArithmeticError):
    """Two processes computed the same microbatch differently, as all processes know; the step has to be taken again."""


class Undecided(RuntimeError):
    """They did, and it cannot be told who was right."""


@dataclass(frozen=True)
class Tried:
    """What came of it: who was wrong, which virtual workers, and who computes them from now on in this step.

    `gpus` are those of the `liars`, in words; empty on CPUs.
    """

    workers: list[int]
    owner: int
    auditor: int
    third: int | None
    liars: list[int]
    gpus: list[str]
    moved_to: int | None


class Audit:
    """The audits of a run on this process, which are collective: all take the same decisions.

    `compute` gives the digests of some virtual workers of a step by computing them here, int64, of a length that
    follows from how many these are, and changes nothing. `images(step)` is the number of images of a step. `name` and
    `gpu()` tell people which process this is: `rank 5 on h2`, and `GPU 1 (0000:17:00.0)`, or nothing.
    """

    def __init__(
        self,
        rate: float,
        seed: int,
        workers: int,
        group: int,
        world: World,
        images: Callable[[int], int],
        compute: Callable[[int, Sequence[int]], Tensor],
        name: str = "",
        gpu: Callable[[], str] = lambda: "",
    ):
        self._name, self._gpu = name or f"rank {world.rank}", gpu
        self._rate, self._seed, self._workers, self._group = rate, seed, workers, group
        self._world, self._images, self._compute = world, images, compute
        self._drawn = lru_cache(maxsize=256)(
            self._draw
        )  # asked for by the loader's thread, too, some steps ahead
        self._hosts = _hosts(world) if rate else [0]
        self._lengths: dict[int, int] = {}  # of the digests of so many workers
        self._given: tuple[int, Tensor] | None = None  # the step, and this process's digests in it
        # By step, virtual workers that another process than theirs computes.
        self._moved: dict[int, tuple[list[int], int]] = {}
        self._disputed: tuple[int, Draw, list[Tensor]] | None = None

    def of(self, step: int) -> Draw | None:
        """What is computed twice in a step; nothing that had to be given to another process."""
        if not self._rate or step in self._moved:
            return None
        return self._drawn(step)

    def _draw(self, step: int) -> Draw | None:
        images = self._images(step)
        return draw(self._seed, step, self._rate, images, self._workers, self._group, self._hosts)

    def audits(self, step: int) -> Draw | None:
        """What this process computes in a step beside its own workers."""
        drawn = self.of(step)
        return drawn if drawn and drawn.auditor == self._world.rank else None

    def owns(self, step: int, workers: Sequence[int]) -> bool:
        """Whether another process computes these of its workers, too."""
        drawn = self.of(step)
        return drawn is not None and drawn.owner == self._world.rank and drawn.workers[0] in workers

    def own_workers(self, step: int, workers: list[int]) -> list[int]:
        """This process's virtual workers in a step, with what was given to it, and without what was taken."""
        if step not in self._moved:
            return workers
        moved, rank = self._moved[step]
        rest = [worker for worker in workers if worker not in moved]
        return sorted([*rest, *moved]) if rank == self._world.rank else rest

    def note(self, step: int, digests: Tensor) -> None:
        """What this process found of the workers that are computed twice."""
        self._given = step, digests

    def compare(self, step: int) -> None:
        """Before the update of a step; collective. Disagreement where the two are not the same."""
        drawn = self.of(step)
        if drawn is None:
            return
        mine, self._given = self._given, None
        parties = [drawn.owner, drawn.auditor]
        one, other = self._exchange(mine[1] if mine and mine[0] == step else None, parties, drawn)
        if not torch.equal(one, other):
            self._disputed = step, drawn, [one, other]
            raise Disagreement(
                f"ranks {drawn.owner} and {drawn.auditor} computed virtual worker {drawn.workers[0]} differently"
            )

    def settle(self) -> Tried:
        """After a Disagreement: finds out who was wrong; collective. Undecided where nobody can tell."""
        if self._disputed is None:
            raise RuntimeError("there is nothing to settle")
        step, drawn, first = self._disputed
        self._disputed = None
        third = self._third(drawn)
        told = json.dumps([self._name, self._gpu()]).encode()
        who = [json.loads(one) for one in gather_bytes(self._world, told, "hvd_lb.audit.who")]
        asked = [rank for rank in (drawn.owner, drawn.auditor, third) if rank is not None]
        mine = self._compute(step, drawn.workers) if self._world.rank in asked else None
        now = dict(zip(asked, map(_key, self._exchange(mine, asked, drawn)), strict=True))
        judged = judge([(drawn.owner, _key(first[0])), (drawn.auditor, _key(first[1])), *now.items()])
        if judged.truth is None:
            names = [f"{name} ({gpu})" if gpu else name for name, gpu in (who[rank] for rank in asked)]
            raise Undecided(_why_undecided(step, drawn, names))
        moved_to = _moved_to(drawn, [rank for rank in asked if now[rank] == judged.truth])
        if moved_to is not None:
            self._moved[step] = drawn.workers, moved_to
        found = [gpu for _, gpu in (who[rank] for rank in judged.liars) if gpu]
        return Tried(drawn.workers, drawn.owner, drawn.auditor, third, judged.liars, found, moved_to)

    def _third(self, drawn: Draw) -> int | None:
        """A process on a third host, or on another one than the owner's; None where there are only two processes."""
        parties = (drawn.owner, drawn.auditor)
        left = [rank for rank in range(self._world.size) if rank not in parties]
        used = {self._hosts[rank] for rank in parties}
        return min(left, key=lambda rank: (self._hosts[rank] in used, rank), default=None)

    def _exchange(self, mine: Tensor | None, parties: list[int], drawn: Draw) -> list[Tensor]:
        """What each of these processes has found, by their order; collective."""
        workers = len(drawn.workers)  # the last group, or one in a short step, may have fewer
        if workers not in self._lengths:  # which who computes nothing does not know; the same in every step
            length = torch.tensor([0 if mine is None else mine.numel()])
            self._lengths[workers] = int(
                self._world.maximum_async(length, "hvd_lb.audit.length").wait().item()
            )
        said = torch.zeros(len(parties), self._lengths[workers], dtype=torch.int64)
        if mine is not None:
            said[parties.index(self._world.rank)] = mine
        return list(self._world.allreduce(said, "hvd_lb.audit"))


def _why_undecided(step: int, drawn: Draw, names: Sequence[str]) -> str:
    """`names` of the two or three that have computed it."""
    what = f"virtual worker {drawn.workers[0]} in step {step}"
    if len(names) == 2:
        return (
            f"{names[0]} and {names[1]} compute {what} differently, again and again, and no third can tell which "
            "of them is wrong: try each with hvd-lb doctor --selftest, and go on with three processes or without one"
        )
    return (
        f"{names[0]}, {names[1]} and {names[2]} compute {what} in three ways, so nobody can tell which is right: try "
        "each host with hvd-lb doctor --selftest"
    )


def _moved_to(drawn: Draw, right: list[int]) -> int | None:
    """Who computes the workers when the step is taken again; None: their own process, and it is audited again.

    `right` are the processes that got them right at last: two of three, at least.
    """
    if drawn.owner in right:
        return None if drawn.auditor in right else drawn.owner
    return right[0]


def _key(digests: Tensor) -> tuple[int, ...]:
    return tuple(digests.tolist())


def _hosts(world: World) -> list[int]:
    """A number for the host of each process: that of its first process, which ranks are dealt out by; collective."""
    first = torch.zeros(world.size, dtype=torch.int64)
    first[world.rank] = world.rank - world.local_rank
    return [int(rank) for rank in world.allreduce(first, "hvd_lb.audit.hosts").tolist()]
