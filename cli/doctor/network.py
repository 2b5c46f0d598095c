"""`hvd-lb doctor` with processes on hosts: what the network between them does, and whether they compute alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import rich_click as click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvd_lb.doctor.alike import unlike
from hvd_lb.errors import UserError
from hvd_lb.launch.launch_plan import LaunchPlan
from hvd_lb.launch.measuring.job import compare_bits, measure_network
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.preflight.judge import Request
from hvd_lb.launch.starters.srun import asking_over_srun
from hvd_lb.launch.starters.ssh import asking_over_ssh
from hvd_lb.launch.target import find_target
from hvd_lb.machine.cpu import usable_cores
from hvd_lb.machine.placement import Placement, choose_device, choose_placement, default_gpus
from hvd_lb.network.measure import NetworkReport
from hvd_lb.network.words import allreduce_rows, fit_of, host_rows, problems
from hvd_lb.report.run_directory import replace_text
from hvd_lb.report.text import count
from hvd_lb_cli.dispatch import examine, plan_launch
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.launch import SSH_OPTIONS
from hvd_lb_cli.output.files import new_file, status_1_is_a_verdict


def check_network(
    context: click.Context,
    console: Console,
    options: LaunchOptions,
    device: Literal["auto", "cpu", "cuda"],
    output: Path,
    figures: Path | None,
) -> int:
    """1 when a link is not as the others."""
    target = new_file(figures) if figures else None
    report, _ = measured_network(context, console, options, device, output)
    show_network(console, report)
    wrong = problems(report)
    for line in wrong:
        click.echo(f"wrong   {line}")
    if not wrong:
        click.echo(f"ok      {_well(report)}")
    if target:
        with status_1_is_a_verdict():
            replace_text(target, report.model_dump_json(indent=1) + "\n")
    return 1 if wrong else 0


def measured_network(
    context: click.Context,
    console: Console,
    options: LaunchOptions,
    device: Literal["auto", "cpu", "cuda"],
    output: Path,
) -> tuple[NetworkReport, int]:
    """Measures with the processes of a run, on CPUs one for each host; also the cores of the host that has fewest."""
    placement, plan, cores = measuring_plan(context, console, options, device, output, threads=None)
    if placement.processes == 1:
        raise UserError(
            "--network measures between processes, and here is one: name hosts, as in --hosts h1:8,h2:8"
        )
    with console.status(Text(f"measuring between {count(placement.processes, 'process')}")):
        return measure_network(placement, plan, output.expanduser().absolute()), cores


def check_alike(
    context: click.Context,
    console: Console,
    options: LaunchOptions,
    device: Literal["auto", "cpu", "cuda"],
    output: Path,
) -> int:
    """1 when a process of the hosts computes other bits than the others."""
    placement, plan, _ = measuring_plan(context, console, options, device, output, threads=1)
    with console.status(Text(f"computing a microbatch on {count(placement.processes, 'process')}")):
        answers = compare_bits(placement, plan, output.expanduser().absolute())
    wrong = unlike(answers)
    for line in wrong:
        click.echo(f"wrong   {line}")
    if wrong:
        click.echo("a reproducible run on these hosts would not be reproducible")
        return 1
    hosts = len({answer.host for answer in answers})
    where = f"{count(len(answers), 'process')} on {count(hosts, 'host')}"
    click.echo(f"ok      {where} compute the same bits: {', '.join(answers[0].digests)}")
    return 0


def measuring_plan(
    context: click.Context,
    console: Console,
    options: LaunchOptions,
    device: Literal["auto", "cpu", "cuda"],
    output: Path,
    threads: int | None,
) -> tuple[Placement, LaunchPlan, int]:
    """The processes of a run, on CPUs one for each host; how they are started; cores of the host that has fewest.

    `threads` are those of each; None: as many as a run has.
    """
    target = find_target(options, device, os.environ)
    if target.kind == "local":
        refuse_options(context, SSH_OPTIONS, "is about other hosts: name them, as in --hosts h1:8,h2:8")
        cluster = None
        there = choose_device(device, target.more)
        processes = default_gpus(there) if there == "cuda" else min(2, usable_cores())
        placement = choose_placement(
            there, gpus=processes, processes=processes, threads=threads, more=target.more
        )
    else:
        ask = asking_over_srun(target.gpus) if target.kind == "slurm" else asking_over_ssh(options)
        folder = output.expanduser().absolute()
        request = Request(device, None, folder, options.network_interface, target.more)
        cluster = examine(console, target, request, ask)
        if cluster.device == "cpu" and len(cluster.hosts) > 1:
            said = {host.name: host.slots for host in target.hosts if target.kind == "ssh"}
            cluster = replace(
                cluster, hosts=[replace(host, slots=said.get(host.name) or 1) for host in cluster.hosts]
            )
        placement = cluster.placement(gpus=cluster.slots, processes=None, threads=threads)
    plan = plan_launch(target, cluster, placement, options, None)
    return placement, plan, min(cluster.cores.values()) if cluster else usable_cores()


def show_network(console: Console, report: NetworkReport) -> None:
    click.echo(f"allreduce between {count(report.processes, 'process')} on {report.device}, float32:")
    _table(console, ("size", "time", "bus bandwidth"), allreduce_rows(report))
    if line := fit_of(report):
        click.echo(line)
    if report.links:
        click.echo("links between hosts, one TCP stream in each direction:")
        _table(console, ("host", "interface", "sends", "receives", "latency"), host_rows(report))


def _table(console: Console, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """On a terminal with lines, else in columns."""
    if console.is_terminal:
        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _well(report: NetworkReport) -> str:
    if not report.links:
        return f"{count(report.processes, 'process')} on one host reach each other"
    return f"all links between {count(len(report.hosts), 'host')} are alike, within a factor of two"
