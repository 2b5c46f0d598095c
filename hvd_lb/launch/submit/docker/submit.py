"""`hvd-lb train --image`: the run inside containers of one image, one on each host, from the first into the others."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hvd_lb.launch.starters.ssh import Reach
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker.commands import inner_command, run_command
from hvd_lb.launch.submit.docker.group import DockerContainers, Interrupted


def run_in_containers(
    submission: Submission,
    hosts: Sequence[tuple[str, int]],
    reach: Reach,
) -> int:
    """Run `hvd-lb ARGUMENTS` over `hosts` (names and slots) in containers; its exit status.

    `reach` gets commands to the hosts. UserError when a container cannot be started. No container is left, however
    this ends.
    """
    names = [name for name, _ in hosts]
    try:
        with DockerContainers(submission, names, reach) as containers:
            return containers.run(inner_command(submission, hosts))
    except Interrupted as interrupted:
        return 128 + interrupted.number


def describe(
    submission: Submission,
    hosts: Sequence[tuple[str, int]],
    reach: Reach,
) -> list[str]:
    """The command lines of `run_in_containers`: one per host, then the one that is run in the first container."""
    starts = [reach(name, run_command(submission, "dry-run", name)) for name, _ in hosts]
    return [shlex.join(command) for command in [*starts, inner_command(submission, hosts)]]
