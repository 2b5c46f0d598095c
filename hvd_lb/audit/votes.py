"""Who computed wrongly, from what several processes say of the same microbatch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Vote = tuple[int, Hashable]
"""A process, by its rank, and a result of it."""


@dataclass(frozen=True)
class Judgement:
    """The result that most processes had, at least two of them; None where there is none. `liars` had another one."""

    truth: Hashable | None
    liars: list[int]


def judge(votes: Sequence[Vote]) -> Judgement:
    """Each process may have several votes: of a second try. A process that changes its mind has been wrong once.

    With two processes that each stay with their own result nobody knows who is right, and so with two results that
    have equally many processes.
    """
    supporters: dict[Hashable, set[int]] = {}
    for rank, result in votes:
        supporters.setdefault(result, set()).add(rank)
    ranked = sorted(supporters.items(), key=lambda of: -len(of[1]))
    best = ranked[0]
    if len(best[1]) < 2 or (len(ranked) > 1 and len(ranked[1][1]) == len(best[1])):
        return Judgement(None, [])
    return Judgement(best[0], sorted({rank for rank, result in votes if result != best[0]}))
