"""`hvd-lb train`: a real run, on this machine or on many."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import rich_click as click
from rich.console import Console

from hvd_lb.data.spec import data_folder, data_spec
from hvd_lb.launch.allreduce import allreduce_environment
from hvd_lb.launch.dry_run import describe
from hvd_lb.launch.options import LaunchOptions, environment
from hvd_lb.launch.plan import Launch
from hvd_lb.launch.preflight.ask import Ask
from hvd_lb.launch.preflight.cluster import Cluster
from hvd_lb.launch.preflight.judge import Request, preflight
from hvd_lb.launch.session import plan_job, resume_point_of, run_directory, run_job
from hvd_lb.launch.starters.allocation import Container
from hvd_lb.launch.starters.local import local
from hvd_lb.launch.starters.srun import asking_over_srun, over_srun
from hvd_lb.launch.starters.ssh import asking_over_ssh, over_ssh
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
from hvd_lb.launch.submit.slurm.script import SlurmOptions
from hvd_lb.launch.target import Where, find_where
from hvd_lb.machine.placement import Placement, choose_device, default_gpus, place
from hvd_lb.report.text import count
from hvd_lb.resolve import check_options, explain, resolve
from hvd_lb_cli.arguments import without_values
from hvd_lb_cli.options.kubernetes import kubernetes_options
from hvd_lb_cli.options.launch import launch_options
from hvd_lb_cli.options.recipe import recipe_options, run_options
from hvd_lb_cli.options.slurm import slurm_options
from hvd_lb_cli.show import index_progress, print_plan, print_preflight
from hvd_lb_cli.submit import (
    ElsewhereOptions,
    elsewhere_options,
    goes_elsewhere,
    make_submission,
    refuse_unused,
    run_elsewhere,
)


@click.command()
@run_options
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Processes p that share the virtual workers [default: one per GPU; on CPUs one per core]",
    panel="The run",
)
@launch_options
@elsewhere_options
@slurm_options
@kubernetes_options
@recipe_options
@click.pass_context
def train(
    context: click.Context,
    options: dict[str, Any],
    launch_options: LaunchOptions,
    elsewhere_options: ElsewhereOptions,
    slurm_options: SlurmOptions,
    kubernetes_options: KubernetesOptions,
    recipe: str | None,
    device: Literal["auto", "cpu", "cuda"],
    processes: int | None,
    output: Path | None,
    resume: str,
) -> int:
    """Train a model. Typed again, the same command goes on where the run stopped.

    \b
    hvd-lb train --data digits --gpus 2 --device cpu
    hvd-lb train --data /data/imagenet --gpus 8 --per-gpu-batch 32
    hvd-lb train --data /data/imagenet --gpus 256 --processes 8
    hvd-lb train --data digits --gpus 4 --device cpu --reproducible
    hvd-lb train --data /data/imagenet --gpus 256 --hostfile hosts --output /shared/runs/8k
    hvd-lb train --data /data/imagenet --gpus 256 --launcher slurm --slurm-partition gpu --submit
    hvd-lb train --data /data/imagenet --gpus 16 --hosts h1:8,h2:8 --image ghcr.io/hvd-lb/hvd-lb
    """
    console = Console()
    where = find_where(launch_options, device, os.environ)
    refuse_unused(context, where, elsewhere_options)
    if goes_elsewhere(where, elsewhere_options, slurm_options):
        submission = make_submission(
            context.command,
            sys.argv[1:],
            options,
            recipe=recipe,
            device=device,
            processes=processes,
            output=output,
            where=where,
            launch_options=launch_options,
            options=elsewhere_options,
        )
        return run_elsewhere(
            submission, where, launch_options, elsewhere_options, kubernetes_options, slurm_options
        )
    cluster, container = None, None
    if where.launcher != "local":
        data = data_folder(data_spec(options, check_options(options, recipe)))
        folder = (output or Path("runs")).expanduser().absolute()
        container = slurm_options.container(data, folder, Path.cwd())
        ask = asking_over_srun(container) if where.launcher == "slurm" else asking_over_ssh(launch_options)
        cluster = _examine(
            console, where, Request(device, data, folder, launch_options.network_interface), ask
        )
    here = cluster.device if cluster else choose_device(device)
    with index_progress(console) as on_progress:
        resolved = resolve(
            options,
            recipe=recipe,
            default_gpus=cluster.slots if cluster else default_gpus(here),
            on_progress=on_progress,
        )
    gpus, threads = resolved.recipe.gpus, resolved.recipe.threads
    if cluster:
        placement = cluster.place(gpus=gpus, processes=processes, threads=threads)
    else:
        placement = place(here, gpus=gpus, processes=processes, threads=threads)
    launch = _launch(where, cluster, placement, launch_options, container)
    if launch_options.dry_run:
        run = run_directory(output, resolved.recipe)
        resume_point = resume_point_of(run, resolved, placement, resume)
        click.echo(describe(plan_job(resolved, placement, launch, run, resume_point), launch, run), nl=False)
        return 0
    share = f"{placement.processes} on {placement.device}, {count(placement.threads, 'thread')} each"
    rows = [*explain(resolved), ("processes", share)]
    if cluster:
        rows.append(("hosts", f"{', '.join(map(str, launch.hosts))} ({where.how}), by {launch.launcher}"))
    return run_job(
        resolved,
        placement,
        launch,
        output=output,
        resume=resume,
        command=without_values(sys.argv),
        console=console,
        on_ready=lambda: print_plan(console, rows),
    )


def _examine(console: Console, where: Where, request: Request, ask: Ask) -> Cluster:
    """The hosts, when all of them are ready; UserError, after a table, when they are not."""
    with console.status(f"asking {count(len(where.hosts), 'host')}"):
        report = preflight(where.hosts, request, ask)
    if not report.cluster:
        print_preflight(console, report)
    return report.ready()


def _launch(
    where: Where,
    cluster: Cluster | None,
    placement: Placement,
    options: LaunchOptions,
    container: Container | None,
) -> Launch:
    variables = environment(options, os.environ)
    mpirun = cluster.mpirun if cluster else shutil.which("mpirun") is not None
    several_hosts = cluster is not None and len(cluster.hosts) > 1
    variables |= allreduce_environment(
        options.allreduce, placement.device, several_hosts=several_hosts, mpirun=mpirun
    )
    if cluster and where.launcher == "slurm":
        return over_srun(cluster, placement.processes, variables, container)
    if cluster:
        return over_ssh(cluster, placement.processes, options, variables)
    return local(placement.processes, variables)
