"""`hvd-lb train`: its options; `hvd_lb_cli.dispatch` does it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rich_click as click

from hvd_lb.track.target import track_targets
from hvd_lb.world.launched import launched, refuse_unclear
from hvd_lb_cli.detached import detached
from hvd_lb_cli.options.kubernetes import kubernetes_options
from hvd_lb_cli.options.launch import launch_options
from hvd_lb_cli.options.recipe import recipe_options, run_options
from hvd_lb_cli.options.slurm import slurm_options
from hvd_lb_cli.options.submit import submit_options
from hvd_lb_cli.options.topics import TopicCommand
from hvd_lb_cli.options.train import TrainOptions
from hvd_lb_cli.output.terminal import outliving_readers

if TYPE_CHECKING:
    from hvd_lb.launch.options import LaunchOptions
    from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
    from hvd_lb.launch.submit.slurm.script import SlurmOptions
    from hvd_lb_cli.options.submit import SubmitOptions


# What `--help` shows of a hundred options.
_FIRST = (
    *("data", "gpus", "per_gpu_batch", "model", "epochs", "learning_rate"),
    *("recipe", "device", "processes", "output", "resume", "detach"),
    *("hosts", "image", "submit", "dry_run"),
)


@click.command(cls=TopicCommand, first_options=_FIRST)
@run_options
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="P",
    help="Processes p that share the virtual workers [default: one per GPU; on CPUs one per core]",
    panel="The run",
)
@recipe_options
@launch_options
@submit_options
@slurm_options
@kubernetes_options
@click.pass_context
def train(
    context: click.Context,
    options: dict[str, Any],
    launch_options: LaunchOptions,
    submit_options: SubmitOptions,
    slurm_options: SlurmOptions,
    kubernetes_options: KubernetesOptions,
    recipe: str | None,
    device: Literal["auto", "cpu", "cuda"],
    processes: int | None,
    output: Path | None,
    resume: str,
    track: tuple[str, ...],
) -> int:
    """Train a model. Typed again, the same command goes on where the run stopped.

    \b
    hvd-lb train --data digits --gpus 2 --device cpu
    hvd-lb train --data /data/imagenet --gpus 8 --per-gpu-batch 32
    hvd-lb train --data /data/imagenet --gpus 256 --processes 8
    hvd-lb train --data /data/imagenet --gpus 8 --detach
    hvd-lb train --data /data/imagenet --gpus 256 --hostfile hosts --output /shared/runs/8k
    hvd-lb train --data /data/imagenet --gpus 256 --launcher slurm --slurm-partition gpu --submit
    hvd-lb train --data /data/imagenet --gpus 16 --hosts h1:8,h2:8 --image ghcr.io/hvd-lb/hvd-lb
    torchrun --nproc-per-node 8 -m hvd_lb_cli.main train --data /data/imagenet
    """
    train_options = TrainOptions(
        options,
        recipe,
        device,
        processes,
        output,
        resume,
        track_targets(track),
        launch_options,
        submit_options,
        slurm_options,
        kubernetes_options,
    )

    if place := launched(os.environ):
        from hvd_lb_cli.launched import train_launched

        return train_launched(context, train_options, place)
    refuse_unclear(os.environ)

    def work(leave: Callable[[Path], None] | None = None) -> int:
        from hvd_lb_cli.dispatch import dispatch  # here: --help needs none of it

        with outliving_readers():
            return dispatch(context, train_options, leave)

    return detached(work) if submit_options.detach and not launch_options.dry_run else work()
