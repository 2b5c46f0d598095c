"""k virtual workers on p processes: contiguous, balanced to within one, for every p ≤ k (docs/design.md)."""

from __future__ import annotations


def hosted(rank: int, processes: int, workers: int) -> range:
    """The virtual workers floor(r k / p) … floor((r + 1) k / p) − 1 of process `rank`.

    Also divides anything else that is numbered (evaluation batches), then with processes > workers too: some processes
    get an empty range.
    """
    if not 0 <= rank < processes:
        raise ValueError(f"process {rank} of {processes}: expected 0 to {processes - 1}")
    return range(rank * workers // processes, (rank + 1) * workers // processes)
