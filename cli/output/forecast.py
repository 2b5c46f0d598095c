"""What `hvd-lb simulate --cluster` says after its measurements, and the files it writes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hvd_lb.errors import UserError
from hvd_lb.forecast.fit import fit_device
from hvd_lb.forecast.measured import MeasuredCompute
from hvd_lb.forecast.pages import write_forecast
from hvd_lb.forecast.predict import Device, Run, predict
from hvd_lb.forecast.profile import ClusterProfile, DeviceProfile
from hvd_lb.forecast.words import rows
from hvd_lb.machine.cpu import usable_cores
from hvd_lb.recipe import Recipe, period_in_seconds, period_in_steps
from hvd_lb.report.run_directory import replace_text
from hvd_lb.report.text import count
from hvd_lb.resolve import Resolved
from hvd_lb_cli.output.show import print_rows


def foretell(
    console: Console,
    resolved: Resolved,
    cluster: ClusterProfile,
    published: DeviceProfile | None,
    measured: tuple[MeasuredCompute, float | None, int | None],
    here: str,
    output: Path | None,
) -> None:
    """Prints the forecast and, where there is an `output`, writes it."""
    recipe, plan = resolved.recipe, resolved.plan
    parts, loader, memory = measured
    device = (
        _as_published(published, parts)
        if published
        else Device(f"measured here ({here})", parts.compute, parts.error)
    )
    loads, how = _host_loads(cluster, loader)
    device = replace(device, memory=memory, loader=loads)
    seconds = period_in_seconds(recipe.checkpoint_every)
    run = Run(
        model=recipe.model,
        gpus=recipe.gpus,
        per_gpu_batch=recipe.per_gpu_batch,
        steps_per_epoch=plan.steps_per_epoch,
        steps=resolved.total_steps,
        checkpoint_every=period_in_steps(recipe.checkpoint_every, plan.steps_per_epoch) or None,
        checkpoint_seconds=seconds if math.isfinite(seconds) else None,
    )
    forecast = predict(run, device, cluster)
    notes = [*how, *_notes(cluster, parts, recipe)]
    print_rows(console, [*rows(forecast), *notes])
    if output is None:
        return
    folder = output.expanduser().absolute()
    try:
        files = write_forecast(folder, forecast, notes)
        if published is None:
            files.append(folder / "device.yaml")
            replace_text(files[-1], fit_device(recipe, parts, name="measured", where=here).to_yaml())
    except OSError as error:
        raise UserError(
            f"forecast folder {folder} cannot be written ({error.strerror}): choose another --output"
        ) from None
    print_rows(console, [("written", ", ".join(path.name for path in files) + f" in {folder}")])


def refuse_other_runs(profile: DeviceProfile, recipe: Recipe) -> None:
    """UserError where a device was measured with another model, size, minibatch or precision."""
    of = (profile.model, profile.image_size, profile.per_gpu_batch, profile.precision)
    asked = (recipe.model, recipe.image_size, recipe.per_gpu_batch, recipe.precision)
    if of != asked:
        words = "--model {} --image-size {} --per-gpu-batch {} --precision {}"
        raise UserError(
            f"--device-profile {profile.name} was measured with {words.format(*of)}, and this run has "
            f"{words.format(*asked)}: leave it out on such a GPU, or write a profile of your own"
        )


def _as_published(profile: DeviceProfile, parts: MeasuredCompute) -> Device:
    """The times of a device as a profile has them, divided into forward, backward and buckets as measured here."""
    here = parts.compute
    whole = profile.microbatch_ms / 1000
    update = whole * here.update / here.seconds if profile.update_ms is None else profile.update_ms / 1000
    share = here.backward / (here.forward + here.backward)
    backward = (whole - update) * share if profile.backward_ms is None else profile.backward_ms / 1000
    # What is not backward here may be less there: an update is a part of what is left.
    update = min(update, (whole - backward) / 2)
    compute = replace(
        here.scaled(backward / here.backward),
        forward=whole - backward - update,
        update=update,
        spread=profile.spread or 0.0,
    )
    return Device(
        f"{profile.name}, {profile.description}", compute, profile.error, profile.spread is not None
    )


def _host_loads(cluster: ClusterProfile, loader: float | None) -> tuple[float | None, list[tuple[str, str]]]:
    """Images per second of a host there, and how that is known."""
    if cluster.loader_images_s:
        return cluster.loader_images_s, []
    if loader is None:
        return None, []
    cores = usable_cores()
    if not cluster.cores_per_host:
        return None, [("loading here", f"{loader:,.0f} images/s with {count(cores, 'core')}")]
    loads = loader * cluster.cores_per_host / cores
    return loads, [
        (
            "loading here",
            f"{loader:,.0f} images/s with {count(cores, 'core')}; {cluster.cores_per_host} there are taken to load "
            f"{cluster.cores_per_host / cores:.1f} times as many",
        )
    ]


def _notes(cluster: ClusterProfile, parts: MeasuredCompute, recipe: Recipe) -> list[tuple[str, str]]:
    size = (
        f"{parts.images} of {recipe.per_gpu_batch} images"
        if parts.images < recipe.per_gpu_batch
        else "n images"
    )
    found = [
        (
            "measured",
            f"{parts.microbatches} microbatches of {size} in parts, {count(len(parts.compute.buckets), 'bucket')}",
        )
    ]
    if parts.images < recipe.per_gpu_batch:
        found.append(
            (
                "note",
                f"times are those of {count(parts.images, 'image')}, in proportion, and too long where n images keep a "
                "device busier: give a longer --budget",
            )
        )
    if recipe.gpus > (cluster.most_gpus or recipe.gpus):
        found.append(("note", f"{cluster.name} has {cluster.most_gpus} GPUs: this is beyond it"))
    return found
