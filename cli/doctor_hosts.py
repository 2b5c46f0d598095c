"""`hvd-lb doctor --hosts`: the preflight of `hvd-lb train` on its own."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich.console import Console

from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.preflight import Request, asking_over_ssh, preflight
from hvd_lb.launch.where import named_hosts
from hvd_lb.report.progress import count
from hvd_lb.resolve import data_folder
from hvd_lb_cli.show import print_preflight


def examine_hosts(
    console: Console, options: LaunchOptions, device: str, data: str | None, output: Path
) -> int:
    """Shows what is found on each; 1 when a run could not start there."""
    where = named_hosts(options)
    hosts = where.hosts if where else []
    folder = data_folder(data) if data else None
    request = Request(device, folder, output.expanduser().absolute(), options.network_interface)
    with console.status(f"asking {count(len(hosts), 'host')}"):
        report = preflight(hosts, request, asking_over_ssh(options))
    print_preflight(console, report)
    if not report.cluster:
        click.echo("`hvd-lb train` cannot run on these hosts as they are")
        return 1
    ready = report.cluster
    click.echo(
        f"ready: {', '.join(map(str, ready.hosts))}: {count(ready.slots, 'process')} on {ready.device}"
    )
    return 0
