"""The options of `train` that say where and how its processes are started."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import rich_click as click

from hvd_lb.launch.options import AllreduceName, ElasticPolicy, LauncherName, LaunchOptions
from hvd_lb.world.engine import EngineName
from hvd_lb_cli.options.kinds import Finite

_option = functools.partial(click.option, panel="Where it runs")
_OPTIONS = (
    _option(
        "--launcher",
        type=click.Choice(get_args(LauncherName)),
        default="auto",
        show_default=True,
        help="How processes are started: auto takes the named hosts, else the allocation that this is in (Slurm, "
        "MPIJob, LSF, PBS, Grid Engine, SkyPilot), else this machine. Outside of an allocation, slurm and kubernetes "
        "write a job.",
    ),
    _option(
        "--hosts", metavar="H1:8,H2:8", help="Hosts and the processes each takes [its GPUs; on CPUs cores]"
    ),
    _option(
        "--hostfile",
        type=click.Path(path_type=Path),
        help="A file of hosts: `h1 slots=8` or `h1:8` a line, or as PBS and Grid Engine write them.",
    ),
    _option(
        "--ssh-port", type=click.IntRange(1, 65535), help="Port of the hosts' sshd [as in ~/.ssh/config]"
    ),
    _option("--ssh-key", type=click.Path(path_type=Path), help="Private key to log in with [ssh's default]"),
    _option(
        "--strict-host-keys",
        is_flag=True,
        help="Refuse hosts that known_hosts does not list. Else their keys are noted at the first login, and checked "
        "from then on.",
    ),
    _option(
        "--network-interface",
        metavar="NAME",
        help="Interface for the processes' traffic [the one by which a host reaches the others]",
    ),
    _option(
        "--engine",
        type=click.Choice(get_args(EngineName)),
        default="auto",
        show_default=True,
        help="What adds up gradients between processes: auto takes Horovod where it is installed and fits this torch, "
        "else torch.distributed (NCCL, Gloo). With --reproducible both give the same bits.",
    ),
    _option(
        "--allreduce",
        type=click.Choice(get_args(AllreduceName)),
        default="auto",
        show_default=True,
        help="auto: NCCL's choice on GPUs, on CPUs shared memory within one machine and Gloo's ring between several; "
        "ring; hierarchical: NCCL inside a host and MPI between them; halving-doubling: Open MPI's Rabenseifner "
        "algorithm, on CPUs.",
    ),
    _option("--fusion-threshold", type=Finite(0, 1e6), metavar="MB", help="Horovod's fusion buffer [0]"),
    _option(
        "--cycle-time",
        type=Finite(0, 1e6),
        metavar="MS",
        help="From one of Horovod's cycles to the next [1; on CPUs 10]",
    ),
    _option(
        "--autotune", is_flag=True, help="Let Horovod tune fusion threshold and cycle time while it runs."
    ),
    _option(
        "--timeline", type=click.Path(path_type=Path), help="Write Horovod's timeline, for chrome://tracing."
    ),
    _option(
        "--forecast",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A forecast.json of `hvd-lb simulate`: the run says at its end how right it was.",
    ),
    _option(
        "--pin/--no-pin",
        default=LaunchOptions.pin,
        show_default=True,
        help="Bind each of a host's processes to cores of its own, near its GPU; a binding of yours (taskset, mpirun, "
        "OMP_PLACES) stays.",
    ),
    _option(
        "--hang-timeout",
        type=Finite(0, 1e6),
        metavar="SECONDS",
        help="After so long without a step or a batch of an evaluation the run is ended, with the ranks that keep the "
        "others waiting and where they are; with --elastic these are taken out. 0: never. [300; 60 with --elastic]",
    ),
    _option(
        "--elastic",
        is_flag=True,
        help="Go on with those that are left when processes are lost; they are started again, and join. docs/"
        "fault-tolerance.md",
    ),
    _option(
        "--min-processes",
        type=click.IntRange(min=1),
        default=LaunchOptions.min_processes,
        show_default=True,
        metavar="P",
        help="With --elastic: with fewer processes wait for those that are being started, or end.",
    ),
    _option(
        "--elastic-policy",
        type=click.Choice(get_args(ElasticPolicy)),
        default=LaunchOptions.elastic_policy,
        show_default=True,
        help="With --elastic, when the number of processes changes: keep the minibatch, whose virtual workers are "
        "dealt out again, or rescale it with them, and the learning rate with it.",
    ),
    _option(
        "--host-discovery",
        type=click.Path(path_type=Path),
        metavar="SCRIPT",
        help="With --elastic, in place of --hosts: a program that prints `host:slots` lines, asked every 5 s. New "
        "hosts and slots join after a step, those that it names no more leave after one. `localhost:4`: this machine.",
    ),
    _option(
        "--max-processes",
        type=click.IntRange(min=1),
        metavar="P",
        help="With --host-discovery: never more processes than that [one for each virtual worker]",
    ),
    _option(
        "--restarts",
        type=click.IntRange(0, 1000),
        default=LaunchOptions.restarts,
        show_default=True,
        metavar="N",
        help="After a failure go on from the newest checkpoint, up to N times, without the hosts that do not answer.",
    ),
    _option(
        "--log-samples",
        is_flag=True,
        help="Write into RUN/logs which images each process gave to each step: about 8 bytes an image.",
    ),
    _option(
        "--env",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Set a variable in every process, or pass on the one set here; may be repeated. NCCL_*, GLOO_*, UCX_*, "
        "OMP_* and the like are passed on anyway.",
    ),
    _option("--dry-run", is_flag=True, help="Print what would be run, to copy; start and write nothing."),
)
LAUNCH_OPTIONS = {option.name for option in fields(LaunchOptions)}
#: Those that mean the same where the command runs in the end.
FORWARDED = {
    "network_interface",
    "engine",
    "allreduce",
    "fusion_threshold",
    "cycle_time",
    "autotune",
    "timeline",
    "forecast",
    "pin",
    "hang_timeout",
    "elastic",
    "min_processes",
    "elastic_policy",
    "restarts",
    "log_samples",
}
SSH_OPTIONS = {
    "hosts",
    "hostfile",
    "ssh_port",
    "ssh_key",
    "strict_host_keys",
    "network_interface",
}


def launch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of LaunchOptions; the command gets them as `launch_options`."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> Any:
        return command(
            launch_options=LaunchOptions(**{name: arguments.pop(name) for name in LAUNCH_OPTIONS}),
            **arguments,
        )

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def host_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds those that say which hosts and how to reach them; the command gets a LaunchOptions."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in SSH_OPTIONS}
        return command(launch_options=LaunchOptions(**given), **arguments)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        if option(lambda: None).__click_params__[-1].name in SSH_OPTIONS:  # type: ignore[attr-defined]
            decorated = option(decorated)
    return decorated
