"""`hvd-lb simulate`: the same run on one process, before anyone pays for 256 GPUs."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.text import Text

from hvd_lb.recipe import Recipe
from hvd_lb.report.text import count, duration, speed
from hvd_lb_cli.arguments import without_secrets
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.recipe import recipe_options, run_options
from hvd_lb_cli.options.topics import TopicCommand
from hvd_lb_cli.output.show import index_progress, print_rows
from hvd_lb_cli.output.terminal import outliving_readers, plain_console

if TYPE_CHECKING:
    from hvd_lb.resolve import Resolved
    from hvd_lb.simulate import Rehearsal

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


class _Duration(click.ParamType[float]):
    """60s, 5min or 1h, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(s|min|h)", str(value), re.ASCII)
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a duration such as 60s, 5min or 1h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


# What `--help` shows.
_FIRST = (
    *("data", "gpus", "per_gpu_batch", "model", "epochs", "steps", "learning_rate"),
    *("whole", "budget", "recipe", "device", "output", "resume"),
)


@click.command(cls=TopicCommand, first_options=_FIRST)
@click.option(
    "--run",
    "whole",
    is_flag=True,
    help="Take all steps of the run and write a run directory, as `train` does; --steps takes so many of them.",
    panel="The run",
)
@click.option(
    "--budget",
    type=_Duration(),
    default="60s",
    show_default=True,
    help="How long a rehearsal may take.",
    panel="The run",
)
@run_options
@recipe_options
@click.pass_context
def simulate(
    context: click.Context,
    options: dict[str, Any],
    recipe: str | None,
    device: str,
    output: Path | None,
    resume: str,
    budget: float,
    whole: bool,
) -> int:
    """Run the same steps on one process, without Horovod: same plan, same learning rate, same weights.

    It is a rehearsal within --budget that says how long a step, an epoch and the run would take here, and writes
    nothing. With --run it is the run, and with --steps the first of its steps; both write a run directory as `train`
    does.

    \b
    hvd-lb simulate --gpus 256 --per-gpu-batch 32
    hvd-lb simulate --gpus 256 --per-gpu-batch 32 --data /data/imagenet --steps 20
    hvd-lb simulate --data digits --gpus 4 --epochs 3 --run
    """
    whole = whole or "steps" in options
    refuse_options(
        context,
        {"budget"} if whole else {"output", "resume"},
        "is for a rehearsal, and --run or --steps ask for a run"
        if whole
        else "is for a run, and this is a rehearsal: add --run for all of its steps, or --steps N",
    )
    import torch  # here: --help needs neither it nor what follows

    from hvd_lb.launch.session import default_output, run_job
    from hvd_lb.launch.starters.local import local
    from hvd_lb.machine.placement import choose_device, choose_placement
    from hvd_lb.resolve import explain, resolve
    from hvd_lb.simulate import rehearse
    from hvd_lb.world.launched import refuse_several

    refuse_several(os.environ, "hvd-lb simulate")
    started = time.monotonic()
    console = plain_console()
    device_name = choose_device(device)
    with index_progress(console) as on_progress:
        resolved = resolve(
            options, recipe=recipe, default_gpus=1, fallback_data="synthetic", on_progress=on_progress
        )
    placement = choose_placement(
        device_name, gpus=resolved.recipe.gpus, processes=1, threads=resolved.recipe.threads
    )
    plan = [*explain(resolved, device_name), ("memory", _memory(resolved.recipe))]
    if whole:
        with outliving_readers():
            return run_job(
                resolved,
                placement,
                local(1, {}),
                output=output or default_output(resolved.recipe, "simulate-"),
                resume=resume,
                command=without_secrets(sys.argv),
                console=console,
                on_ready=lambda: print_rows(console, plan),
            )
    if "epochs" in options:
        plan.append(
            ("rehearsal", "nothing is written; add --run to take all steps, as --epochs alone did before")
        )
    print_rows(console, plan)
    with console.status(Text("rehearsing …")) as status:
        rehearsal = rehearse(
            resolved,
            device=torch.device(device_name),
            threads=placement.threads,
            deadline=started + budget,
            on_microbatch=lambda step, done, of: status.update(
                Text(f"rehearsing: step {step}, microbatch {done}/{of}")
            ),
        )
    print_rows(
        console, _findings(resolved, rehearsal, f"{device_name}, {count(placement.threads, 'thread')}")
    )
    return 0


def _memory(recipe: Recipe) -> str:
    from hvd_lb.training.models import parameter_count

    parameters = parameter_count(recipe.model, recipe.num_classes or 1)
    size = 3 * parameters * (8 if recipe.precision == "fp64" else 4)
    integers = ""
    if recipe.reproducible:
        size += 8 * parameters
        integers = ", their sums in fixed point"
    return (
        f"{size / 1e6:,.0f} MB for weights, gradients{integers} and momentum of {parameters / 1e6:.2f} M parameters, "
        f"and the activations of one batch; the same for any --gpus"
    )


def _findings(resolved: Resolved, rehearsal: Rehearsal, where: str) -> list[tuple[str, str]]:
    """What a rehearsal found out, as (topic, sentence)."""
    recipe, plan = resolved.recipe, resolved.plan
    seconds = rehearsal.microbatch_seconds
    how = (
        f"measured over {count(rehearsal.steps, 'whole step')}"
        if rehearsal.steps
        else f"{recipe.gpus} times the microbatch, as no whole step fitted into the budget"
    )
    measured = f"{count(rehearsal.steps, 'whole step')}, {rehearsal.microbatches:,} microbatches in all"
    if not rehearsal.microbatches:
        measured = f"{count(rehearsal.probed, 'image')} only, as not one microbatch would fit into the budget"
    together = f", {rehearsal.together} virtual workers as one batch" if rehearsal.together > 1 else ""
    rows = [
        ("measured here", f"{where}: {measured}"),
        (
            "microbatch",
            f"{duration(seconds)} for {recipe.per_gpu_batch} images ({speed(recipe.per_gpu_batch / seconds)})"
            + together,
        ),
        ("a step", f"{duration(rehearsal.step_seconds)} on this one process ({how})"),
        (
            "an epoch",
            f"{duration(rehearsal.step_seconds * plan.steps_per_epoch)} for {plan.steps_per_epoch:,} steps",
        ),
        ("the whole run", duration(rehearsal.step_seconds * resolved.total_steps)),
        ("peak memory", f"{rehearsal.peak_memory / 1e6:,.0f} MB of this process"),
    ]
    if rehearsal.losses:
        steps = ", ".join(f"{loss:.4f}" for loss in (rehearsal.losses[0], *rehearsal.losses[1:][-1:]))
        rows.insert(1, ("loss", f"{steps} (first and last whole step)"))
    return rows
