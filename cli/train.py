"""`hvd-lb train`: a real run on this machine's processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console

from hvd_lb.hardware import choose_device, default_gpus, place
from hvd_lb.launch.run import run_job
from hvd_lb.report.progress import count
from hvd_lb.resolve import explain, resolve
from hvd_lb_cli.options import recipe_options, run_options
from hvd_lb_cli.show import index_progress, print_plan


@click.command()
@run_options
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Processes p that share the virtual workers [default: one per GPU; on CPUs one per core]",
)
@recipe_options
def train(
    options: dict[str, Any],
    recipe: str | None,
    device: str,
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
    """
    console = Console()
    where = choose_device(device)
    with index_progress(console) as on_progress:
        resolved = resolve(options, recipe=recipe, default_gpus=default_gpus(where), on_progress=on_progress)
    placement = place(where, gpus=resolved.recipe.gpus, processes=processes, threads=resolved.recipe.threads)
    share = f"{placement.processes} on {placement.device}, {count(placement.threads, 'thread')} each"
    return run_job(
        resolved,
        placement,
        output=output,
        resume=resume,
        command=sys.argv,
        console=console,
        on_ready=lambda: print_plan(console, [*explain(resolved), ("processes", share)]),
    )
