"""`hvd-lb doctor --hosts`: the preflight of `hvd-lb train` on its own."""

from __future__ import annotations

import os
from pathlib import Path

import rich_click as click
from rich.console import Console
from rich.text import Text

from hvd_lb.data.spec import data_folder
from hvd_lb.launch.hosts import in_words
from hvd_lb.launch.options import LaunchOptions, carried_environment
from hvd_lb.launch.preflight.judge import Request, preflight
from hvd_lb.launch.starters.ssh import asking_over_ssh, reach_over_ssh
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker.check import docker_preflight
from hvd_lb.launch.target import named_target
from hvd_lb.report.text import count
from hvd_lb_cli.output.show import print_preflight


def examine_hosts(
    console: Console, options: LaunchOptions, device: str, data: str | None, output: Path, image: str | None
) -> int:
    """Shows what is found on each, for containers of an image if one is named; 1 when a run could not start there."""
    target = named_target(options)
    hosts = target.hosts if target else []
    folder = data_folder(data) if data else None
    folder_of_output = output.expanduser().absolute()
    with console.status(Text(f"asking {count(len(hosts), 'host')}")):
        if image:
            # As `train --image`: where nobody says otherwise, for GPUs.
            submission = Submission(
                (), "", "cpu" if device == "cpu" else "cuda", 1, 1, folder_of_output, folder, image=image
            )
            report = docker_preflight(
                submission, [host.name for host in hosts], reach_over_ssh(options), options
            )
        else:
            variables = carried_environment(os.environ)
            request = Request(
                device, folder, folder_of_output, options.network_interface, environment=variables
            )
            report = preflight(hosts, request, asking_over_ssh(options))
    print_preflight(console, report)
    if report.problems:
        click.echo("`hvd-lb train` cannot run on these hosts as they are")
        return 1
    if ready := report.cluster:
        names, what = ready.hosts, f"{count(ready.slots, 'process')} on {ready.device}"
    else:
        names, what = hosts, "containers"
    click.echo(f"ready: {in_words(names)}: {what}")
    return 0
