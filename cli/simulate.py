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

from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe
from hvd_lb.report.text import count, duration, speed
from hvd_lb.track.target import refuse_untracked, track_targets
from hvd_lb_cli.arguments import without_secrets
from hvd_lb_cli.options.given import refuse_options
from hvd_lb_cli.options.kinds import Finite
from hvd_lb_cli.options.recipe import recipe_options, run_options
from hvd_lb_cli.options.topics import TopicCommand
from hvd_lb_cli.output.show import index_progress, print_rows
from hvd_lb_cli.output.terminal import outliving_readers, plain_console

if TYPE_CHECKING:
    from hvd_lb.forecast.profile import ClusterProfile
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
    *("whole", "budget", "cluster", "recipe", "device", "output", "resume"),
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
@click.option(
    "--cluster",
    metavar="NAME|FILE",
    help="Also foretell the run on --gpus GPUs of this cluster: a shipped profile (docs/forecast.md) or a file.",
    panel="A forecast",
)
@click.option(
    "--device-profile",
    metavar="NAME|FILE",
    default="measured",
    show_default=True,
    help="With --cluster: times of one GPU there, h100, p100 or a file, instead of those measured here.",
    panel="A forecast",
)
@click.option(
    "--price-per-gpu-hour",
    "price",
    type=Finite(0),
    help="With --cluster: what a GPU costs in an hour, in any money.",
    panel="A forecast",
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
    track: tuple[str, ...],
    budget: float,
    whole: bool,
    cluster: str | None,
    device_profile: str,
    price: float | None,
) -> int:
    """Run the same steps on one process, without Horovod: same plan, same learning rate, same weights.

    It is a rehearsal within --budget that says how long a step, an epoch and the run would take here, and writes
    nothing. With --cluster it also foretells the run there, and --output keeps that forecast. With --run it is the run,
    and with --steps the first of its steps; both write a run directory as `train` does.

    \b
    hvd-lb simulate --gpus 256 --per-gpu-batch 32
    hvd-lb simulate --gpus 256 --per-gpu-batch 32 --data /data/imagenet --steps 20
    hvd-lb simulate --gpus 256 --cluster big-basin --device-profile p100
    hvd-lb simulate --data digits --gpus 4 --epochs 3 --run
    """
    whole = whole or "steps" in options
    forecasting = {"cluster", "device_profile", "price"}
    if whole:
        refuse_options(
            context, {"budget", *forecasting}, "is for a rehearsal, and --run or --steps ask for a run"
        )
    else:
        refuse_options(
            context,
            {"resume", "track"} if cluster else {"resume", "output", "track"},
            "is for a run, and this is a rehearsal: add --run for all of its steps, or --steps N",
        )
        if cluster is None:
            refuse_options(context, forecasting, "is for a forecast: add --cluster, as in --cluster dgx-h100")
    targets = track_targets(track)
    refuse_untracked(targets)
    import torch  # here: --help needs neither it nor what follows

    from hvd_lb.forecast.profile import load_device
    from hvd_lb.launch.session import default_output, refuse_unaudited, run_job
    from hvd_lb.launch.starters.local import local
    from hvd_lb.machine.placement import choose_device, choose_placement
    from hvd_lb.resolve import explain, refuse_graphs, resolve
    from hvd_lb.simulate import measure_device, rehearse
    from hvd_lb.world.launched import refuse_several
    from hvd_lb_cli.output.forecast import foretell, refuse_other_runs

    refuse_several(os.environ, "hvd-lb simulate")
    there = _cluster(cluster, price) if cluster else None
    if there and output and output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: expected a folder for the forecast")
    published = load_device(device_profile) if there and device_profile != "measured" else None
    started = time.monotonic()
    console = plain_console()
    device_name = choose_device(device)
    with index_progress(console) as on_progress:
        resolved = resolve(
            options, recipe=recipe, default_gpus=1, fallback_data="synthetic", on_progress=on_progress
        )
    if output:
        resolved.dataset.refuse_among_classes(output.expanduser())
    if published:
        refuse_other_runs(published, resolved.recipe)
    refuse_graphs(resolved.recipe, device_name)
    placement = choose_placement(
        device_name, gpus=resolved.recipe.gpus, processes=1, threads=resolved.recipe.threads
    )
    plan = [*explain(resolved, placement), ("memory", _memory(resolved.recipe))]
    if whole:
        refuse_unaudited(resolved.recipe)
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
                track=targets,
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
            deadline=started + (budget / 2 if there else budget),
            on_microbatch=lambda step, done, of: status.update(
                Text(f"rehearsing: step {step}, microbatch {done}/{of}")
            ),
        )
    here = f"{device_name}, {count(placement.threads, 'thread')}"
    found = _findings(resolved, rehearsal, here)
    if there is None:
        from hvd_lb.forecast.words import without_cluster

        print_rows(console, [*found, without_cluster()])
        return 0
    print_rows(console, found)
    with console.status(Text("measuring a microbatch in parts …")):
        measured = measure_device(
            resolved,
            device=torch.device(device_name),
            threads=placement.threads,
            deadline=started + budget,
            guess=rehearsal.microbatch_seconds,
            loads=resolved.recipe.data != "synthetic",
        )
    foretell(console, resolved, there, published, measured, here, output)
    return 0


def _cluster(name: str, price: float | None) -> ClusterProfile:
    from hvd_lb.forecast.profile import load_cluster

    profile = load_cluster(name)
    return profile if price is None else profile.model_copy(update={"price_per_gpu_hour": price})


def _memory(recipe: Recipe) -> str:
    from hvd_lb.training.models import parameter_count

    classes, number = recipe.num_classes or 1, 8 if recipe.precision == "fp64" else 4
    all_of_them = parameter_count(recipe.model, classes)
    learning = parameter_count(recipe.model, classes, recipe.freeze)
    bytes_of = {"weights": number * all_of_them, "gradients": number * learning}
    if recipe.reproducible:
        bytes_of["their sums in fixed point"] = 8 * learning
    if recipe.ema:
        bytes_of["averaged weights"] = number * all_of_them
    if recipe.optimizer == "lamb":
        bytes_of["LAMB's two averages"] = 2 * number * learning
    else:
        bytes_of["momentum"] = number * learning
    *names, last = bytes_of
    some = f", of which {learning / 1e6:.2f} M learn" if learning < all_of_them else ""
    return (
        f"{sum(bytes_of.values()) / 1e6:,.0f} MB for {', '.join(names)} and {last} of {all_of_them / 1e6:.2f} M "
        f"parameters{some}, and the activations of one batch; the same for any --gpus"
    )


def _findings(resolved: Resolved, rehearsal: Rehearsal, where: str) -> list[tuple[str, str]]:
    """What a rehearsal found out, as (topic, sentence)."""
    from hvd_lb.advice import advice

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
    if noise := rehearsal.noise:
        scale = f"{noise.value:,.0f} images" if noise.value is not None else "not told from any number yet"
        most = f"{noise.high:,.0f}" if noise.high is not None else "any number"
        rows.append(
            (
                "noise scale",
                f"{scale} ({noise.low:,.0f} to {most}) over these first steps: minibatches far above it gain little; "
                "it grows as training goes on",
            )
        )
        warnings = advice(
            recipe,
            resolved.preset,
            steps_per_epoch=plan.steps_per_epoch,
            images=plan.images,
            noise=noise,
        )
        rows += [("advice", line) for line in warnings if "noise scale" in line]
    if rehearsal.losses:
        steps = ", ".join(f"{loss:.4f}" for loss in (rehearsal.losses[0], *rehearsal.losses[1:][-1:]))
        rows.insert(1, ("loss", f"{steps} (first and last whole step)"))
    return rows
