"""Processes on this machine alone: `horovodrun` for several, a plain process for one."""

from __future__ import annotations

from collections.abc import Mapping

from hvd_lb.errors import UserError
from hvd_lb.launch.allreduce import needs_mpi
from hvd_lb.launch.hosts import Host
from hvd_lb.launch.launch_plan import LaunchPlan, horovodrun_command, rank_command
from hvd_lb.launch.preflight.probe import unknown_to_itself
from hvd_lb.launch.starters.ssh import mpirun_arguments
from hvd_lb.world.build import import_horovod

_HERE = "localhost"


def local(processes: int, environment: Mapping[str, str]) -> LaunchPlan:
    """So many processes here. UserError when several are asked for and no Horovod could connect them."""
    if processes == 1:
        return LaunchPlan("local", [Host(_HERE, 1)], rank_command, environment=environment)
    try:
        import_horovod()
    except UserError as error:
        raise UserError(f"{error}; or use --processes 1 or `hvd-lb simulate`") from None
    if nameless := unknown_to_itself():
        raise UserError(f"several processes cannot find each other on this machine: {nameless}")
    hosts = [Host(_HERE, processes)]
    mpi_arguments = mpirun_arguments(("ssh",), ["lo"]) if needs_mpi(environment) else None
    return LaunchPlan(
        "local",
        hosts,
        lambda job_file: horovodrun_command(
            hosts, job_file, address="127.0.0.1", interfaces=["lo"], mpi_arguments=mpi_arguments
        ),
        interfaces={_HERE: "lo"},
        environment=environment,
    )
