"""The options of `--launcher slurm`, one for each field of SlurmOptions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from hvd_lb.launch.submit.slurm.script import SlurmOptions
from hvd_lb_cli.options.kinds import THREADS


class _Written(click.ParamType[str]):
    """A word that Slurm can read."""

    def __init__(self, name: str, pattern: str, such_as: str):
        self.name, self._pattern, self._such_as = name, pattern, such_as

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(self._pattern, value, re.ASCII | re.IGNORECASE):
            self.fail(f"{value!r} is not what Slurm reads, such as {self._such_as}", param, ctx)
        return str(value)


_TIME = _Written(
    "LIMIT",
    "[0-9]{1,9}(:[0-9]{1,2}){0,2}|[0-9]{1,5}-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED|INFINITE",
    "24:00:00 or 2-0",
)
_MEMORY = _Written("SIZE", "[0-9]{1,12}([KMGT]B?)?", "480G")
_option = functools.partial(click.option, panel="Slurm")
_OPTIONS = (
    _option("--slurm-partition", metavar="NAME", help="Slurm: partition of the job [the site's default]"),
    _option(
        "--slurm-time",
        type=_TIME,
        help="Slurm: time limit, such as 24:00:00 or 2-0 [the site's]",
    ),
    _option("--slurm-account", metavar="NAME", help="Slurm: account the job is charged to [the user's]"),
    _option("--slurm-qos", metavar="NAME", help="Slurm: quality of service [the site's default]"),
    _option("--slurm-constraint", metavar="FEATURES", help="Slurm: features of the nodes, such as h100&ib"),
    _option(
        "--slurm-cpus-per-task",
        type=THREADS,
        metavar="CORES",
        help="Slurm: cores for each process",
    ),
    _option(
        "--slurm-memory",
        type=_MEMORY,
        help="Slurm: memory of each node, such as 480G; 0: all",
    ),
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
            container_mounts=tuple(
                str(Path(folder).expanduser().absolute()) for folder in arguments.pop("container_mount")
            ),
        )
        return command(slurm_options=options, **arguments)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
