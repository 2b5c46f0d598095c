"""Which rank a process is, the name of its log, and of errors that another rank has caused."""

from __future__ import annotations

import os

from hvd_lb.world.launched import launched


def this_rank() -> int:
    """The rank that the launcher gave this process; 0 for one on its own."""
    place = launched(os.environ)
    return place.rank if place else 0


#: The variable that tells a newcomer of an elastic job its number, its host, and which place of how many it has there.
MEMBER = "HVD_LB_MEMBER"

#: The variable of a process that has begun again: its generation, its step, and the descriptor of what it carries.
CARRIED = "HVD_LB_CARRIED"

#: The variable with the descriptor of an empty file in memory, which the agent of an elastic job holds for all ranks of
#: its host (`--cache memory`).
PIXELS = "HVD_LB_PIXELS_FD"


def log_name(rank: int, host: str) -> str:
    """The file in RUN/logs that a rank writes to."""
    return f"rank-{rank:04d}-{host}.log"


#: What rank 0 writes where the ranks have measured something.
MEASURED = "measured.json"

#: What a rank says when another one has failed: Horovod's error, and ours for torch.distributed.
OF_OTHERS = ("HorovodInternalError", "ExchangeError")
