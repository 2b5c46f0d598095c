"""Processes on this machine alone: a head and an agent for several or an elastic job, a plain process for one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from hvd_lb.errors import UserError
from hvd_lb.launch.allreduce import needs_mpi
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.launch_plan import LaunchPlan, head_command, mpirun_command, rank_command
from hvd_lb.launch.preflight.probe import unknown_to_itself

_HERE = "localhost"


def local(processes: int, environment: Mapping[str, str], *, elastic: bool = False) -> LaunchPlan:
    """So many processes here. UserError when several are asked for that would not find each other."""
    if processes == 1 and not elastic:
        return LaunchPlan("local", [Host(_HERE, 1)], rank_command, environment=environment)
    if processes > 1 and (nameless := unknown_to_itself()):
        raise UserError(f"several processes cannot find each other on this machine: {nameless}")
    hosts = [Host(_HERE, processes)]
    mpi = needs_mpi(environment)
    command = (
        partial(mpirun_command, hosts, interfaces=["lo"])
        if mpi
        else partial(head_command, address="127.0.0.1", how="each")
    )
    return LaunchPlan(
        "local", hosts, command, interfaces={_HERE: "lo"}, environment=environment, agents=not mpi
    )
