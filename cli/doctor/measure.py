"""`hvd-lb measure`: the profile of the hosts at hand, for `hvd-lb simulate --cluster`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Literal

import rich_click as click

from hvd_lb.launch.options import LaunchOptions
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.options.launch import host_options
from hvd_lb_cli.output.terminal import plain_console


@click.command()
@click.argument("profile", type=Target())
@host_options
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="What is to compute."
)
@click.option(
    "--output",
    type=Target(),
    default=Path("runs"),
    help="A folder that all hosts share, for files of the measurement.",
)
@click.pass_context
def measure(
    context: click.Context,
    profile: Path,
    launch_options: LaunchOptions,
    device: Literal["auto", "cpu", "cuda"],
    output: Path,
) -> int:
    """Measure the network between hosts, or processes of this machine, and write PROFILE for `simulate --cluster`.

    It starts the processes of a run, as `hvd-lb doctor --network` does, times allreduces of several sizes and the links
    by themselves, and fits latency and bandwidth, with the error of the fit. Add to the file what it cannot know:
    prices, the memory of GPUs, failures (docs/forecast.md).

    \b
    hvd-lb measure ours.yaml --hosts h1:8,h2:8 --output /shared/runs
    hvd-lb simulate --gpus 256 --cluster ours.yaml
    """
    from hvd_lb.errors import UserError
    from hvd_lb.forecast.fit import fit_cluster
    from hvd_lb.network.words import fit_of, problems
    from hvd_lb.report.run_directory import replace_text
    from hvd_lb_cli.doctor.network import measured_network, show_network

    console = plain_console()
    path = profile.expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{profile} cannot be written: expected the name of a file in a folder that is there")
    report, cores = measured_network(context, console, launch_options, device, output)
    show_network(console, report)
    today = datetime.date.today().isoformat()
    found = fit_cluster(report, name=path.stem, cores=cores, when=today)
    try:
        replace_text(path, found.to_yaml())
    except OSError as error:
        raise UserError(f"{profile} cannot be written: {error.strerror}") from None
    for line in problems(report):
        click.echo(f"wrong   {line}")
    between = found.between
    click.echo(
        f"{path.name}: {between.latency_us:,.1f} µs a step, {between.bandwidth_gbit_s:,.2f} Gbit/s, give or take "
        f"{100 * between.error:.0f} %, and {found.overhead_us:,.0f} µs for each allreduce ({fit_of(report)})"
    )
    return 0
