"""Other machines over ssh: the command lines of a job, and how the preflight asks them."""

from __future__ import annotations

import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from hvd_lb.errors import UserError
from hvd_lb.launch.allreduce import needs_mpi
from hvd_lb.launch.hosts import assign, is_this_machine
from hvd_lb.launch.launch_plan import LaunchPlan, head_command, mpirun_command
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.preflight.ask import Ask, ask_all, explain_failure
from hvd_lb.launch.preflight.cluster import Cluster

Reach = Callable[[str, Sequence[str]], list[str]]
"""Gives the command line that runs a command on a host, reading and writing what that reads and writes."""

_CONNECT_SECONDS = 10
# Without these, the processes of a host that went away would be waited for until TCP gives up, two hours.
_ALIVE_SECONDS, _ALIVE_COUNT = 15, 4
_ANSWER_SECONDS = 90.0


def ssh_command(options: LaunchOptions) -> list[str]:
    """ssh with what a run needs of it; a host's name and a command line for its shell follow."""
    command = [
        # Whatever a login by hand gets by ~/.ssh/config: a terminal, and a command such as tmux.
        *("ssh", "-T", "-o", "RemoteCommand=none", "-o", "BatchMode=yes"),
        *("-o", f"StrictHostKeyChecking={'yes' if options.strict_host_keys else 'accept-new'}"),
        *("-o", f"ConnectTimeout={_CONNECT_SECONDS}"),
        *("-o", f"ServerAliveInterval={_ALIVE_SECONDS}", "-o", f"ServerAliveCountMax={_ALIVE_COUNT}"),
    ]
    if options.ssh_port is not None:
        command += ["-p", str(options.ssh_port)]
    if options.ssh_key is not None:
        command += ["-i", str(options.ssh_key.expanduser().absolute())]
    return command


def over_ssh(
    cluster: Cluster, processes: int, options: LaunchOptions, environment: Mapping[str, str]
) -> LaunchPlan:
    """`processes` on the hosts of a cluster, by agents over Gloo, or by Open MPI where the allreduce needs it."""
    hosts = assign(cluster.hosts, processes)
    ssh = ssh_command(options)
    mpi = needs_mpi(environment)
    # mpirun takes one list for all hosts, in which a name that a host does not have is passed over.
    interfaces = sorted({cluster.interface, *(cluster.interfaces[host.name] for host in hosts)})
    command = (
        partial(mpirun_command, hosts, interfaces=interfaces, ssh=ssh)
        if mpi
        else partial(head_command, address=cluster.address, how="each", command=ssh)
    )
    return LaunchPlan(
        "ssh",
        hosts,
        command,
        interfaces={host.name: cluster.interfaces[host.name] for host in hosts},
        environment=environment,
        agents=not mpi,
    )


def on_host(ssh: Sequence[str], host: str, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on `host`; without ssh when that is this machine."""
    return list(command) if is_this_machine(host) else [*ssh, host, shlex.join(command)]


def reach_over_ssh(options: LaunchOptions) -> Reach:
    return partial(on_host, ssh_command(options))


def asking_over_ssh(options: LaunchOptions, over: threading.Event | None = None) -> Ask:
    """Asks over ssh, or without when a host is this machine, until it is `over`; UserError without the key."""
    if options.ssh_key is not None and not options.ssh_key.expanduser().is_file():  # ssh would try other keys
        raise UserError(f"--ssh-key {options.ssh_key}: no such file; give the private key to log in with")

    def ask(hosts: list[str], question: str) -> dict[str, str | UserError]:
        ssh = ssh_command(options)
        if shutil.which("ssh") is None and not all(map(is_this_machine, hosts)):
            raise UserError(
                "hosts are reached by ssh, and there is none on PATH: apt-get install openssh-client"
            )
        # Not from a folder of the user's: a `python -m` finds modules there.
        commands = {
            host: on_host(ssh, host, [sys.executable, "-P", "-m", "hvd_lb.launch.preflight.probe", host])
            for host in hosts
        }
        answers: dict[str, str | UserError] = {}
        for host, completed in ask_all(commands, question, _ANSWER_SECONDS, over).items():
            ended_well = completed is not None and completed.returncode == 0
            answers[host] = (
                completed.stdout
                if completed and ended_well
                else UserError(explain_failure(host, completed, options))
            )
        return answers

    return ask
