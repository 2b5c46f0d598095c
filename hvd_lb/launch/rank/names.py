"""Which rank a process is, and the name of its log."""

from __future__ import annotations

import os


def this_rank() -> int:
    """The rank that the launcher gave this process; 0 for one on its own."""
    for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def log_name(rank: int, host: str) -> str:
    """The file in RUN/logs that a rank writes to."""
    return f"rank-{rank:04d}-{host}.log"
