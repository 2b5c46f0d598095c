"""`hvd-lb doctor`: what this machine, or every one of several, has for a run, what it lacks, and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Literal

import rich_click as click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvd_lb.doctor.examine import examine
from hvd_lb.doctor.finding import Finding
from hvd_lb.doctor.selftest import selftest
from hvd_lb.launch.options import LaunchOptions
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.options.launch import SSH_OPTIONS, host_options
from hvd_lb_cli.output.terminal import plain_console

_COLOURS = {"ok": "green", "missing": "yellow", "wrong": "red"}


@click.command()
@click.option(
    "--selftest",
    "with_selftest",
    is_flag=True,
    help="Also run a sum, DALI's pixels and ten training steps on every device here (about a minute). With --hosts: "
    "whether all of them compute the same bits.",
)
@click.option(
    "--network",
    is_flag=True,
    help="Measure the network between the hosts, or the processes of this machine, and name the link that is slow.",
)
@click.option(
    "--json", "figures", type=Target(), metavar="FILE", help="With --network: write the figures there."
)
@host_options
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="With --hosts or --network."
)
@click.option("--data", help="With --hosts: the data that a run will read.")
@click.option(
    "--image", metavar="NAME", help="With --hosts: for a run in containers; looks for Docker instead."
)
@click.option("--output", type=Target(), default=Path("runs"), help="With --hosts or --network: where to.")
@click.pass_context
def doctor(
    context: click.Context,
    with_selftest: bool,
    network: bool,
    figures: Path | None,
    launch_options: LaunchOptions,
    device: Literal["auto", "cpu", "cuda"],
    data: str | None,
    output: Path,
    image: str | None,
) -> int:
    """Check what this machine has for a run; exit code 1 when `hvd-lb train` could not run.

    Each line is ok, missing or wrong, with the fix. A missing GPU or Open MPI is no failure.
    With --hosts or --hostfile it checks those, as `hvd-lb train` does before it starts anything. With --network it
    starts processes there and measures, within a minute or so, allreduces between all and each link between two hosts.
    With --selftest it has each of them compute the same microbatch: unlike hardware or libraries are found before a
    reproducible run begins.

    \b
    hvd-lb doctor --selftest
    hvd-lb doctor --hosts h1:8,h2:8 --data /data/imagenet --output /shared/runs
    hvd-lb doctor --hosts h1:8,h2:8 --selftest --output /shared/runs
    hvd-lb doctor --hosts h1:8,h2:8 --network --output /shared/runs
    """
    console = plain_console()
    if network:
        refuse_options(
            context, {"with_selftest", "data", "image"}, "is not looked at with --network: leave it out"
        )
        from hvd_lb_cli.doctor.network import check_network

        return check_network(context, console, launch_options, device, output, figures)
    refuse_options(context, {"figures"}, "is for the figures of --network: give that, or leave it out")
    if launch_options.hosts is not None or launch_options.hostfile is not None:
        if with_selftest:
            refuse_options(
                context, {"data", "image"}, "is not looked at with --selftest and --hosts: leave it out"
            )
            from hvd_lb_cli.doctor.network import check_alike

            return check_alike(context, console, launch_options, device, output)
        if image is not None:
            refuse_options(
                context,
                {"network_interface"},
                "is not looked at with --image: containers find it when they start",
            )
        from hvd_lb_cli.doctor.hosts import examine_hosts  # needs torch, which this command looks for

        return examine_hosts(console, launch_options, device, data, output, image)
    refuse_options(
        context,
        {*SSH_OPTIONS, "device", "data", "image", "output"},
        "is what hosts are examined for: name them, as in --hosts h1:8,h2:8, or leave it out",
    )
    findings = chain(examine(), selftest() if with_selftest else ())
    shown = _show_table(console, findings) if console.is_terminal else _print_lines(findings)
    failed = [finding.name.strip() for finding in shown if finding.prevents_training]
    if failed:
        click.echo(f"`hvd-lb train` cannot run here as it is: {', '.join(failed)}")
    return 1 if failed else 0


def _show_table(console: Console, findings: Iterable[Finding]) -> list[Finding]:
    table = Table("", "state", "found", "fix", box=box.SIMPLE_HEAD)
    shown = []
    with console.status(Text("examining")) as status:
        for finding in findings:
            status.update(Text(f"examined {finding.name.strip()}"))
            state = Text(finding.state, style=_COLOURS[finding.state])
            table.add_row(Text(finding.name), state, Text(finding.detail), Text(finding.fix))
            shown.append(finding)
    console.print(table)
    return shown


def _print_lines(findings: Iterable[Finding]) -> list[Finding]:
    """One line each, as soon as it is known: for pipes and logs."""
    shown = []
    for finding in findings:
        fix = f"; fix: {finding.fix}" if finding.fix else ""
        click.echo(f"{finding.state:<8}{finding.name:<16}  {finding.detail}{fix}")
        shown.append(finding)
    return shown
