"""Which virtual workers are computed a second time, and by whom: a function of seed, step and processes alone.

In a step that is drawn, with the probability `rate`, one virtual worker (of those that are computed together, all) is
computed again by a process that does not host it: one on another host where there is one. Each worker, and each process
that may, is drawn alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvd_lb.plan.counter import generator_seed, uniform
from hvd_lb.plan.hosting import hosted

# The key of these random numbers among those of a run.
_AUDIT = 3


@dataclass(frozen=True)
class Draw:
    """Virtual `workers`, one or a group, which process `owner` hosts and process `auditor` computes again."""

    workers: list[int]
    owner: int
    auditor: int


def draw(
    seed: int, step: int, rate: float, images: int, workers: int, group: int, hosts: Sequence[int]
) -> Draw | None:
    """That of a step of so many `images` for all `workers`; None where the step is not drawn.

    `hosts` is the number of the host of each process; with one process nothing is drawn.
    """
    processes = len(hosts)
    if processes < 2 or float(uniform(seed, _AUDIT, step)[0]) >= rate:
        return None
    # In a short step some have none.
    active = [worker for worker in range(workers) if len(hosted(worker, workers, images))]
    units = sorted({worker // group for worker in active})
    unit = units[_below(len(units), seed, _AUDIT, step, 1)]
    chosen = [worker for worker in active if worker // group == unit]
    owner = next(rank for rank in range(processes) if chosen[0] in hosted(rank, processes, workers, group))
    others = [rank for rank in range(processes) if hosts[rank] != hosts[owner]]
    others = others or [rank for rank in range(processes) if rank != owner]
    return Draw(chosen, owner, others[_below(len(others), seed, _AUDIT, step, 2)])


def _below(end: int, *keys: int) -> int:
    return generator_seed(*keys) % end


def expected_steps(rate: float, processes: int) -> float:
    """Steps until a process that computes every microbatch wrongly is found, on average.

    It is the owner of what is drawn in a share 1/p of the audited steps, where all processes host equally many, and the
    auditor in as many.
    """
    return processes / (2 * rate)
