"""`hvd-lb train`: from its options to a run on this machine or on many, or to a job that is submitted."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import rich_click as click
from rich.console import Console
from rich.text import Text

from hvd_lb.data.spec import data_folder, data_spec
from hvd_lb.errors import UserError
from hvd_lb.forecast.held import forecast_for
from hvd_lb.launch.allreduce import allreduce_environment, needs_mpi
from hvd_lb.launch.dry_run import describe
from hvd_lb.launch.hosts import Host, in_words
from hvd_lb.launch.launch_plan import LaunchPlan
from hvd_lb.launch.options import CYCLE_TIME, LaunchOptions, environment
from hvd_lb.launch.preflight.ask import Ask
from hvd_lb.launch.preflight.cluster import Cluster
from hvd_lb.launch.preflight.discovery import Come, Discovery, Examined
from hvd_lb.launch.preflight.judge import Request, preflight
from hvd_lb.launch.session import (
    make_job,
    refuse_unaudited,
    rescaled,
    resume_point_of,
    run_directory,
    run_job,
    unlike_hosts,
)
from hvd_lb.launch.starters.allocation import PyxisContainer
from hvd_lb.launch.starters.local import local
from hvd_lb.launch.starters.srun import asking_over_srun, over_srun
from hvd_lb.launch.starters.ssh import asking_over_ssh, over_ssh
from hvd_lb.launch.target import Target, find_target
from hvd_lb.machine.cpu import KERNEL_VARIABLES
from hvd_lb.machine.gpus import SHOWN_BY
from hvd_lb.machine.placement import Placement, choose_device, choose_placement, default_gpus
from hvd_lb.recipe import Recipe
from hvd_lb.report.text import count
from hvd_lb.resolve import check_options, explain, refuse_graphs, resolve
from hvd_lb.track.target import refuse_untracked
from hvd_lb.world.build import HOW_TO_BUILD, joins_again
from hvd_lb.world.engine import Engine, choose_engine, refuse_unsummed
from hvd_lb.world.launched import launched_alone
from hvd_lb_cli.arguments import without_secrets
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.train import TrainOptions
from hvd_lb_cli.output.files import new_file
from hvd_lb_cli.output.show import index_progress, print_preflight, print_rows
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.submit import is_submission, refuse_unused, submit

_OF_HOROVOD = {"fusion_threshold", "cycle_time", "autotune", "timeline"}
# What is told again at a restart.
_OF_A_START = ("processes", "hosts")
# Seconds before a start that could not be made is tried again, twice as long each time.
_PAUSE, _LONGEST_PAUSE = 10.0, 60.0
_NOT_TRIED = "--elastic on GPUs has not been tried: no such run has lost a process yet"
_ALONE = (
    "--elastic, but never more than one process here, so nobody else has the state when that is lost: others join by "
    "--host-discovery, as many as --gpus and --max-processes allow"
)
_OF_THE_EXCHANGE = {"engine", "allreduce", "elastic", "min_processes", "elastic_policy", *_OF_HOROVOD}


def dispatch(
    context: click.Context, options: TrainOptions, leave: Callable[[Path], None] | None = None
) -> int:
    """Train, go on, print what would be run, or submit; the exit status. `context` is that of `train`.

    `leave` is called with the run directory when all is checked.
    """
    console = plain_console()
    target = find_target(options.launch, options.device, os.environ)
    refuse_unused(context, target, options.submit)
    if is_submission(target, options):
        return submit(context.command, options, target)
    refuse_untracked(options.track)
    restarts, pause = Restarts(options.launch.restarts), _PAUSE
    status = _train(context, options, target, leave, restarts, console)
    while restarts.wanted(status, console):
        try:
            target = find_target(options.launch, options.device, os.environ)  # there may be other hosts now
            status = _train(context, options, target, leave, restarts, console)
            pause = _PAUSE
        except (UserError, OSError) as error:
            # It could begin before: a switch, a file system or what names the hosts is away for a while.
            print(f"hvd-lb: error: {' '.join(str(error).split())}", file=sys.stderr)
            status = 1
            if restarts.left:
                console.print(f"waiting {pause:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
    return status


@dataclass
class Restarts:
    """How often a run that fails is still started again; from the second start on, its virtual workers and device."""

    left: int
    gpus: int | None = None
    device: str = ""

    @property
    def begun(self) -> bool:
        return self.gpus is not None

    def wanted(self, status: int, console: Console) -> bool:
        """Whether it goes on after an end with this exit status: 1, not a signal or an option that is wrong."""
        if status != 1 or not self.left:
            return False
        self.left -= 1
        console.print(f"starting again (--restarts; {self.left:,} more after this one)")
        return True


def _train(
    context: click.Context,
    options: TrainOptions,
    target: Target,
    leave: Callable[[Path], None] | None,
    restarts: Restarts,
    console: Console,
) -> int:
    """Once, as `dispatch`."""
    again = restarts.begun
    variables = environment(options.launch, os.environ)
    # A checkpoint is held against them, and they are those of the ranks.
    os.environ.update({name: variables[name] for name in KERNEL_VARIABLES if name in variables})
    cluster, container, discovery = None, None, None
    if target.kind != "local":
        data = data_folder(data_spec(options.fields, check_options(options.fields, options.recipe)))
        folder = (options.output or Path("runs")).expanduser().absolute()
        container = options.slurm.container(data, folder, Path.cwd())
        ask = (
            asking_over_srun(target.gpus, container)
            if target.kind == "slurm"
            else asking_over_ssh(options.launch)
        )
        request = Request(
            restarts.device or options.device,  # the hosts that are left may have no GPUs
            data,
            folder,
            options.launch.network_interface,
            target.more,
            variables,
            grows=options.launch.host_discovery is not None,
        )
        cluster = examine(console, target, request, ask, some_will_do=again)
    else:
        if options.launch.timeline is not None:  # Horovod would leave it out, untold
            new_file(options.launch.timeline)
        # Those that the ranks will see.
        os.environ.update({name: variables[name] for name in SHOWN_BY if name in variables})
    here = cluster.device if cluster else choose_device(restarts.device or options.device, target.more)
    with index_progress(console) as on_progress:
        resolved = resolve(
            options.fields,
            recipe=options.recipe,
            default_gpus=restarts.gpus or (cluster.slots if cluster else default_gpus(here)),
            on_progress=on_progress,
        )
    recipe = resolved.recipe
    gpus, threads, group = recipe.gpus, recipe.threads, recipe.fixed_group
    restarts.gpus, restarts.device, processes = gpus, here, options.processes
    rescale = options.launch.elastic and options.launch.elastic_policy == "rescale"
    most = -(-gpus // group)
    if options.launch.max_processes:
        most = options.launch.max_processes if rescale else min(most, options.launch.max_processes)
    if cluster:
        if options.launch.host_discovery and not processes:
            processes = min(most, cluster.slots)
        if again and processes:  # hosts may have been lost
            processes = min(processes, cluster.slots)
        placement = cluster.placement(gpus=gpus, processes=processes, threads=threads, group=group)
    else:
        placement = choose_placement(
            here, gpus=gpus, processes=processes, threads=threads, group=group, more=target.more
        )
    placement = replace(placement, pin=options.launch.pin)
    several = placement.processes > 1 or options.launch.elastic  # others may join
    if not several and not again:
        refuse_options(
            context, _OF_THE_EXCHANGE, "is about the exchange between processes, and this run has one"
        )
    if placement.processes == 1 and not again and not options.launch.host_discovery:
        refuse_unaudited(recipe)
    refuse_graphs(recipe, placement.device)
    launch_plan = plan_launch(target, cluster, placement, options.launch, container)
    if cluster and options.launch.host_discovery:
        script = options.launch.host_discovery.expanduser().absolute()
        known = {host.name: host.slots or 1 for host in launch_plan.hosts}
        over, like = threading.Event(), placement if recipe.reproducible else None
        ask = asking_over_ssh(options.launch, over)
        examine_new = partial(newcomers, replace(request, device=here), ask, like)
        discovery = Discovery(script, known, examine_new, over)
    refuse_of_horovod(context, launch_plan.engine, launch_plan.why_engine)
    if several:
        refuse_unsummed(launch_plan.engine, recipe.compress)
    elastic = options.launch.min_processes if options.launch.elastic else None
    if elastic is not None:
        refuse_elastic(placement, launch_plan, elastic)
        if placement.processes > most:
            raise UserError(
                f"--processes {placement.processes:,} with --max-processes {most:,}: give at most as many"
            )
        if rescale:
            refuse_rescale(recipe)
    if options.launch.dry_run:
        if options.launch.forecast:
            forecast_for(options.launch.forecast, recipe, placement.processes)
        directory = run_directory(options.output, resolved.recipe)
        resume_point = resume_point_of(directory, resolved, placement, options.resume)
        if resume_point.finished:
            console.print(resume_point.finished, soft_wrap=True)
            return 0
        resolved, per_process = rescaled(resolved, placement, resume_point, elastic if rescale else None)
        click.echo(
            describe(
                make_job(
                    resolved,
                    placement,
                    launch_plan,
                    directory,
                    resume_point,
                    elastic,
                    options.launch.log_samples,
                    per_process=per_process,
                ),
                launch_plan,
                directory,
            ),
            nl=False,
        )
        return 0
    share = f"{placement.processes} on {placement.device}, {count(placement.threads, 'thread')} each"
    if placement.processes == 1 and recipe.audit:
        share += ", and nobody to audit it (--audit)"
    rows = [*explain(resolved, placement), ("processes", share)]
    if placement.processes == 1 and (alone := launched_alone(os.environ)):
        rows.append(("started", f"as a job of one process ({alone})"))
    if launch_plan.why_engine:
        rows.append(("engine", f"{launch_plan.engine}, {launch_plan.why_engine}"))
    if cluster:
        rows.append(("hosts", f"{in_words(launch_plan.hosts)} ({target.how}), by {launch_plan.starter}"))
    if launch_plan.engine == "horovod" and needs_mpi(launch_plan.environment):
        rows.append(("controller", f"MPI, which --allreduce {options.launch.allreduce} needs"))
    elif launch_plan.engine == "horovod" and cluster and several:
        rows.append(("controller", "Gloo, as nothing here needs MPI"))
    warnings = [_NOT_TRIED] if elastic is not None and placement.device == "cuda" else []
    if elastic is not None and placement.processes == 1 and (most == 1 or not discovery):
        warnings.append(_ALONE)

    def ready() -> None:
        print_rows(console, [row for row in rows if row[0] in _OF_A_START] if again else rows)
        for warning in warnings:
            console.print(Text.assemble(("warning:", "yellow"), f" {warning}"), soft_wrap=True)
        if leave and not again:
            leave(run_directory(options.output, resolved.recipe).path)

    return run_job(
        resolved,
        placement,
        launch_plan,
        output=options.output,
        resume="auto" if again else options.resume,
        command=without_secrets(sys.argv),
        console=console,
        on_ready=ready,
        forecast=None if again else options.launch.forecast,  # a copy of it is in the run directory
        elastic=elastic,
        track=options.track,
        log_samples=options.launch.log_samples,
        max_processes=most if discovery else None,
        discovery=discovery,
        rescale=rescale,
    )


def refuse_of_horovod(context: click.Context, engine: Engine, why: str) -> None:
    """UserError for an option that only Horovod reads, where it is not Horovod that exchanges."""
    if engine == "torch":
        refuse_options(context, _OF_HOROVOD, f"is Horovod's own, and this run has torch.distributed ({why})")


def refuse_elastic(placement: Placement, plan: LaunchPlan, least: int) -> None:
    """UserError for a run that cannot be elastic, or not yet."""
    if least > placement.processes:
        raise UserError(
            f"--min-processes {least:,} of {count(placement.processes, 'process')}: give at most as many"
        )
    why = ""
    if placement.device == "cuda" and plan.engine == "horovod":
        why = "on GPUs with Horovod, where a process that waits for a lost one is not freed: give --engine torch"
    elif plan.engine == "horovod" and needs_mpi(plan.environment):
        why = (
            "with an --allreduce of Open MPI, which ends all processes with the first: give --allreduce ring"
        )
    elif plan.engine == "horovod" and CYCLE_TIME in plan.environment and not joins_again():
        why = (
            "with --cycle-time (HOROVOD_CYCLE_TIME) and this Horovod, which crashes when it joins again: leave it "
            f"out, or {HOW_TO_BUILD}"
        )
    if why:
        raise UserError(f"--elastic is not possible yet {why}")


def refuse_rescale(recipe: Recipe) -> None:
    """UserError for a run whose minibatch cannot follow the number of processes."""
    why = ""
    if recipe.shuffle == "per-worker":
        why = "--shuffle per-worker divides the images among the virtual workers: give --shuffle global"
    elif recipe.repeated_augment > 1:
        why = "--repeated-augment counts images by whole minibatches of one size: leave it out"
    elif not recipe.momentum_correction:
        why = "--no-momentum-correction would keep velocities of the rate before a change: leave it out"
    elif recipe.on_nan == "rollback":
        why = "--on-nan rollback takes the very steps since a checkpoint again, of which k is another: leave it out"
    elif recipe.recompute_bn:
        why = "--recompute-bn changes the state after a step, by other sums with another k: leave it out"
    if why:
        raise UserError(f"--elastic-policy rescale: {why}")


def examine(
    console: Console, target: Target, request: Request, ask: Ask, some_will_do: bool = False
) -> Cluster:
    """The hosts, when all of them are ready; UserError, after a table, when they are not.

    `some_will_do`: those that are ready, if any are; the others are told.
    """
    hosts = target.hosts
    while True:
        with console.status(Text(f"asking {count(len(hosts), 'host')}")):
            report = preflight(hosts, request, ask)
        ready = [host for host in hosts if host.name in report.ready_hosts]
        if report.cluster or not some_will_do or len(ready) in (0, len(hosts)):
            break
        for problem in report.problems:
            console.print(f"left out: {problem}", soft_wrap=True)
        hosts = ready
    if not report.cluster:
        print_preflight(console, report)
    return report.ready()


def newcomers(
    request: Request,
    ask: Ask,
    like: Placement | None,
    hosts: Sequence[Host],
    new: Set[str],
    present: Mapping[str, int],
) -> Examined:
    """Of `hosts` those that are `new`, with a note where one has not hardware `like` that of a run's first ones."""
    problems: dict[str, str] = {}
    request = replace(request, running=present)
    while new - problems.keys():
        report = preflight(hosts, request, ask)
        if cluster := report.cluster:
            found = [host for host in cluster.hosts if host.name in new]
            unlike = unlike_hosts(like, cluster.hardware(found)) if like else {}
            notes = {
                name: f"{name} has other hardware than the run began with ({what}), which may compute other bits: "
                "`hvd-lb doctor --selftest --hosts …` tells"
                for what, names in unlike.items()
                for name in names
            }
            return [
                Come(host.name, host.slots or 1, cluster.interfaces[host.name], notes.get(host.name, ""))
                for host in found
            ], problems
        for finding, names in report.wrong():
            problems |= dict.fromkeys(new & set(names), finding.detail)
        ready = [host for host in hosts if host.name in report.ready_hosts]
        if len(ready) == len(hosts):  # it is this machine that has a problem
            return [], dict.fromkeys(new, "; ".join(report.problems))
        hosts = ready  # others may be away just now
    return [], problems


def plan_launch(
    target: Target,
    cluster: Cluster | None,
    placement: Placement,
    options: LaunchOptions,
    container: PyxisContainer | None,
) -> LaunchPlan:
    """How the ranks are started; `cluster` is None for this machine alone."""
    variables = environment(options, os.environ)
    mpirun = cluster.mpirun if cluster else shutil.which("mpirun") is not None
    several_hosts = cluster is not None and len(cluster.hosts) > 1
    several = placement.processes > 1 or options.elastic
    engine, why = choose_engine(options.engine, None) if several else ("horovod", "")
    variables |= allreduce_environment(
        options.allreduce, placement.device, several_hosts=several_hosts, mpirun=mpirun, engine=engine
    )
    if cluster and target.kind == "slurm":
        plan = over_srun(
            cluster, placement.processes, target.gpus, variables, container, elastic=options.elastic
        )
    elif cluster:
        plan = over_ssh(cluster, placement.processes, options, variables)
    else:
        plan = local(placement.processes, variables, elastic=options.elastic)
    return replace(plan, engine=engine, why_engine=why)
