"""The options of `train` for containers and for jobs that are written for Slurm or Kubernetes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rich_click as click

#: What the release workflow publishes; docs/image.md says how to pin a digest.
PUBLISHED_IMAGE = "ghcr.io/hvd-lb/hvd-lb"


@dataclass(frozen=True)
class SubmitOptions:
    """Options of `train` for runs in containers, for jobs that are submitted, and for who does not wait for them."""

    image: str | None = None
    container_port: int = 12345
    per_node: int = 8
    submit: bool = False
    detach: bool = False


_option = functools.partial(click.option, panel="Containers and jobs")
_OPTIONS = (
    click.option(
        "--detach",
        is_flag=True,
        help="Go on without this terminal once all is checked; see `hvd-lb status`, `logs` and `stop`. Jobs are "
        "submitted and not followed.",
        panel="The run",
    ),
    _option(
        "--image",
        metavar="NAME",
        help=f"Run in containers of this image, one on each host; {PUBLISHED_IMAGE} is the published one.",
    ),
    _option(
        "--container-port",
        type=click.IntRange(1024, 65535),
        default=12345,
        show_default=True,
        help="With --image over ssh: where the sshd of the containers listens, on the hosts' network.",
    ),
    _option(
        "--per-node",
        type=click.IntRange(1, 1024),
        default=8,
        show_default=True,
        help="Processes on each node of a job that is written for Slurm or Kubernetes: its GPUs.",
    ),
    _option(
        "--submit",
        is_flag=True,
        help="Submit the job that --launcher slurm or kubernetes writes, and follow it.",
    ),
)


def options_of_systems(command: click.Command) -> set[str]:
    """Those that only a system that is submitted to reads."""
    prefixes = ("k8s_", "slurm_", "sbatch", "container_")
    return {option.name for option in command.params if option.name and option.name.startswith(prefixes)}


def submit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of SubmitOptions; the command gets them as `submit_options`."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in SubmitOptions.__dataclass_fields__}
        return command(submit_options=SubmitOptions(**given), **arguments)

    decorated: Callable[..., Any] = wrapper
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
