"""`hvd-lb train` as one of several processes that torchrun, srun, mpirun or horovodrun has started: each is a rank.

On rank 0 a child plans the run and watches it, as `hvd-lb train` does elsewhere: it is the launching process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import NoReturn

import rich_click as click

from hvd_lb.errors import UserError, renamed
from hvd_lb.launch.agent.process import dies_with_parent
from hvd_lb.launch.launch_plan import START_SECONDS, LaunchPlan, rank_command
from hvd_lb.launch.options import HANG_TIMEOUT, START_TIMEOUT, environment
from hvd_lb.track.target import refuse_untracked
from hvd_lb.world.engine import refuse_unconnected, refuse_unsummed
from hvd_lb.world.launched import Place
from hvd_lb_cli.arguments import without_secrets
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.launch import FORWARDED, LAUNCH_OPTIONS
from hvd_lb_cli.options.submit import SubmitOptions, options_of_systems
from hvd_lb_cli.options.train import TrainOptions
from hvd_lb_cli.output.terminal import outliving_readers, plain_console

# Of those that say how processes are started, these still mean something.
_READ = (FORWARDED - {"network_interface", "allreduce", "restarts"}) | {"env"}
# So long nothing is said of ranks that are waited for.
_PATIENCE_SECONDS = 10.0


def train_launched(context: click.Context, options: TrainOptions, place: Place) -> int:
    """Take part in the run; returns, with the exit status, in the launching process only.

    To be called before there are threads.
    """
    refuse_options(
        context,
        (LAUNCH_OPTIONS - _READ)
        | set(SubmitOptions.__dataclass_fields__)
        | options_of_systems(context.command),
        f"is about starting processes, and {place.launcher} has started {place.size}: leave it out",
    )
    with renamed({"engine": "--engine"}):
        refuse_unconnected(options.launch.engine, place)
    refuse_untracked(options.track)
    if options.processes not in (None, place.size):
        raise UserError(
            f"--processes {options.processes}, and {place.launcher} has started {place.size}: leave it out"
        )
    os.environ |= environment(options.launch, os.environ)
    os.environ.setdefault(START_TIMEOUT, str(START_SECONDS))
    if place.rank:
        _be_rank(options, place)
    ours, theirs = socket.socketpair()
    prepare = dies_with_parent(signal.SIGTERM)
    child = os.fork()
    if child:
        theirs.close()
        _be_rank(options, place, ours, child)
    ours.close()
    os.setsid()  # signals of the launcher are for the ranks, which stop with a checkpoint
    prepare()
    with outliving_readers():
        return _launch(context, options, place, theirs)


def _be_rank(
    options: TrainOptions, place: Place, line: socket.socket | None = None, launching: int = 0
) -> NoReturn:
    from hvd_lb.launch.rank.launched import LaunchingProcess, take_part  # here: they load torch

    take_part(place, options.launch.engine, LaunchingProcess(line, launching) if line else None)


def _launch(context: click.Context, options: TrainOptions, place: Place, line: socket.socket) -> int:
    """In the child of rank 0: plan the run, have the ranks begin, watch them; the exit status."""
    from hvd_lb.launch.hosts import in_words
    from hvd_lb.launch.session import run_job
    from hvd_lb.launch.starters.launched import (
        RankZero,
        choose_gpus,
        hosts_of,
        place_ranks,
        refuse_different,
    )
    from hvd_lb.report.text import count
    from hvd_lb.resolve import explain, refuse_graphs, resolve
    from hvd_lb_cli.dispatch import refuse_of_horovod
    from hvd_lb_cli.output.show import index_progress, print_rows

    console, rank_0 = plain_console(), RankZero(line)
    if not rank_0.met(_PATIENCE_SECONDS):
        console.print(f"waiting for all of the {place.size} processes that {place.launcher} has started")
    try:
        engine, why, ranks = rank_0.ranks()
    except EOFError:  # they never will: it has said why
        return 1
    refuse_different(ranks)
    refuse_of_horovod(context, engine, why)
    device = choose_gpus(ranks, options.device)
    known = dict(os.environ)
    with index_progress(console) as on_progress:
        resolved = resolve(
            options.fields, recipe=options.recipe, default_gpus=place.size, on_progress=on_progress
        )
    refuse_unsummed(engine, resolved.recipe.compress)
    refuse_graphs(resolved.recipe, device)
    placement = place_ranks(place, ranks, device, resolved.recipe, pin=options.launch.pin)
    hosts = hosts_of(ranks)
    # The ranks have theirs, but for what became of --data here: queries of signed URLs.
    variables = environment(options.launch, os.environ)
    told = {
        name: value for name, value in variables.items() if name == HANG_TIMEOUT or known.get(name) != value
    }
    rows = [
        *explain(resolved, placement),
        ("processes", f"{place.size} on {device}, {count(placement.threads, 'thread')} each"),
        ("hosts", f"{in_words(hosts)}, by {place.launcher}"),
        ("engine", f"{engine}, {why}" if why else engine),
    ]
    return run_job(
        resolved,
        placement,
        LaunchPlan(
            "launched",
            hosts,
            rank_command,
            environment=told,
            engine=engine,
            why_engine=why,
            started=rank_0,
        ),
        output=options.output,
        resume=options.resume,
        command=without_secrets(sys.argv),
        console=console,
        on_ready=lambda: print_rows(console, rows),
        forecast=options.launch.forecast,
        track=options.track,
    )
