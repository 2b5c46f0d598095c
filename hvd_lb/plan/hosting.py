"""k virtual workers on p processes: contiguous, balanced to within one, for every p ≤ k (docs/design.md)."""

from __future__ import annotations


def hosted(rank: int, processes: int, workers: int, group: int = 1) -> range:
    """The virtual workers floor(r k / p) … floor((r + 1) k / p) − 1 of process `rank`; of a `group`'s, all or none.

    Groups are `group` consecutive workers each, the last one may have fewer, and are divided as workers are.

    Also divides anything else that is numbered (evaluation batches), then with processes > workers too: some processes
    get an empty range.
    """
    if not 0 <= rank < processes:
        raise ValueError(f"process {rank} of {processes}: expected 0 to {processes - 1}")
    groups = -(-workers // group)
    first, end = (group * (of * groups // processes) for of in (rank, rank + 1))
    return range(min(first, workers), min(end, workers))
