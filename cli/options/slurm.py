"""The options of `--launcher slurm`, one for each field of SlurmOptions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import rich_click as click

from hvd_lb.launch.submit.slurm.script import SlurmOptions

_option = functools.partial(click.option, panel="Slurm")
_OPTIONS = (
    _option("--slurm-partition", metavar="NAME", help="Slurm: partition of the job [the site's default]"),
    _option("--slurm-time", metavar="LIMIT", help="Slurm: time limit, such as 24:00:00 or 2-0 [the site's]"),
    _option("--slurm-account", metavar="NAME", help="Slurm: account the job is charged to [the user's]"),
    _option("--slurm-qos", metavar="NAME", help="Slurm: quality of service [the site's default]"),
    _option("--slurm-constraint", metavar="FEATURES", help="Slurm: features of the nodes, such as h100&ib"),
    _option(
        "--slurm-cpus-per-task",
        type=click.IntRange(min=1),
        metavar="CORES",
        help="Slurm: cores for each process",
    ),
    _option("--slurm-memory", metavar="SIZE", help="Slurm: memory of each node, such as 480G; 0: all"),
    _option(
        "--sbatch",
        multiple=True,
        metavar="OPTION",
        help="Slurm: another option of sbatch, such as --exclusive. Again for each.",
    ),
    _option(
        "--slurm-requeue/--no-slurm-requeue",
        default=SlurmOptions.requeue,
        show_default=True,
        help="Slurm: go on by itself after the time limit, a preemption or the loss of a node.",
    ),
    _option("--container-image", metavar="IMAGE", help="Slurm with Pyxis: run the processes in this image."),
    _option(
        "--container-mount",
        multiple=True,
        metavar="FOLDER",
        help="Slurm with Pyxis: a folder they see beside data, output and working directory. Again for each.",
    ),
)


def slurm_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of SlurmOptions; the command gets them as `slurm_options`."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> Any:
        options = SlurmOptions(
            partition=arguments.pop("slurm_partition"),
            time=arguments.pop("slurm_time"),
            account=arguments.pop("slurm_account"),
            qos=arguments.pop("slurm_qos"),
            constraint=arguments.pop("slurm_constraint"),
            cpus_per_task=arguments.pop("slurm_cpus_per_task"),
            memory=arguments.pop("slurm_memory"),
            lines=tuple(arguments.pop("sbatch")),
            requeue=arguments.pop("slurm_requeue"),
            container_image=arguments.pop("container_image"),
            container_mounts=tuple(arguments.pop("container_mount")),
        )
        return command(slurm_options=options, **arguments)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
