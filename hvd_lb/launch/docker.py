"""`hvd-lb train --image`: the run inside containers of one image, one on each host, from the first into the others."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hvd_lb.launch.containers import Containers, Interrupted
from hvd_lb.launch.docker_run import inner_command, run_command
from hvd_lb.launch.ssh import on_host
from hvd_lb.launch.submission import Submission


def run_in_containers(
    submission: Submission,
    hosts: Sequence[tuple[str, int]],
    ssh: Sequence[str],
    container_port: int = 12345,
) -> int:
    """Run `hvd-lb ARGUMENTS` over `hosts` (names and slots) in containers; its exit status.

    `ssh` is the command line by which other hosts are reached, without their names; `container_port` is where the
    containers' sshd listens. UserError when a container cannot be started. No container is left, however this ends.
    """
    names = [name for name, _ in hosts]
    try:
        with Containers(submission, names, ssh, port=container_port) as containers:
            return containers.run(inner_command(submission, hosts, container_port))
    except Interrupted as interrupted:
        return 128 + interrupted.number


def describe(
    submission: Submission,
    hosts: Sequence[tuple[str, int]],
    ssh: Sequence[str],
    container_port: int = 12345,
) -> list[str]:
    """The command lines of `run_in_containers`: one per host, then the one that is run in the first container."""
    starts = [on_host(ssh, name, run_command(submission, "dry-run", name)) for name, _ in hosts]
    return [shlex.join(command) for command in [*starts, inner_command(submission, hosts, container_port)]]
