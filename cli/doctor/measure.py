"""`hvd-lb measure`: the profile of the hosts at hand, for `hvd-lb simulate --cluster`."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rich_click as click
from rich.console import Console
from rich.text import Text

from hvd_lb.errors import UserError
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.machine.cpu import usable_cores
from hvd_lb.report.run_directory import replace_text
from hvd_lb.report.text import count
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.options.launch import host_options
from hvd_lb_cli.output.files import new_file
from hvd_lb_cli.output.show import index_progress
from hvd_lb_cli.output.terminal import plain_console

if TYPE_CHECKING:
    from hvd_lb.forecast.profile import DeviceProfile
    from hvd_lb.resolve import Resolved

_SECONDS = 20.0  # for a microbatch in parts, and the loader


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
@click.option(
    "--recipe", metavar="NAME|FILE", help="Also measure the device and the loader with this recipe."
)
@click.option("--data", metavar="NAME|PATH", help="Data set for the loader, and so for the device.")
@click.option("--model", help="Model for the device.")
@click.option("--per-gpu-batch", type=click.IntRange(1), help="Images of a microbatch.")
@click.pass_context
def measure(
    context: click.Context,
    profile: Path,
    launch_options: LaunchOptions,
    device: Literal["auto", "cpu", "cuda"],
    output: Path,
    recipe: str | None,
    **fields: Any,
) -> int:
    """Measure the network between hosts, or processes of this machine, and write PROFILE for `simulate --cluster`.

    It starts the processes of a run, as `hvd-lb doctor --network` does, times allreduces of several sizes and the links
    by themselves, and fits latency and bandwidth, with the error of the fit. With a recipe, data or a model it then
    measures this machine, which is to be like the hosts: what its loader reads in a second goes into PROFILE, and what
    its device takes for a microbatch into PROFILE-device.yaml, for `simulate --device-profile`. Add to the files what
    cannot be measured: prices, the memory of GPUs, failures (docs/forecast.md).

    \b
    hvd-lb measure ours.yaml --hosts h1:8,h2:8 --output /shared/runs
    hvd-lb measure ours.yaml --hosts h1:8,h2:8 --output /shared/runs --recipe goyal-resnet50 --data /data/imagenet
    hvd-lb simulate --gpus 256 --cluster ours.yaml
    """
    from hvd_lb.forecast.fit import fit_cluster, with_loader
    from hvd_lb.machine.placement import choose_device
    from hvd_lb.network.words import fit_of, problems
    from hvd_lb_cli.doctor.network import measured_network, show_network

    console = plain_console()
    path = new_file(profile)
    options = {name: value for name, value in fields.items() if value is not None}
    resolved = _resolved(console, options, recipe) if options or recipe else None
    report, cores = measured_network(context, console, launch_options, device, output)
    show_network(console, report)
    today = datetime.date.today().isoformat()
    found = fit_cluster(report, name=path.stem, cores=cores, when=today)
    _write(path, found.to_yaml())
    for line in problems(report):
        click.echo(f"wrong   {line}")
    between = found.between
    click.echo(
        f"{path.name}: {between.latency_us:,.1f} µs a step, {between.bandwidth_gbit_s:,.2f} Gbit/s, give or take "
        f"{100 * between.error:.0f} %, and {found.overhead_us:,.0f} µs for each allreduce ({fit_of(report)})"
    )
    if report.device == "cpu":
        click.echo(
            f"{path.name}: beside computing an allreduce takes {found.exchange_slowdown:.2f} times as long, and "
            f"computing beside an allreduce {found.compute_slowdown:.2f} times"
        )
    if resolved is None:
        return 0
    if choose_device(device) != report.device:
        raise UserError(
            f"the hosts compute on {report.device}, which this machine does not have: {path.name} is written, and "
            "the device is for `hvd-lb measure` on one of them"
        )
    here, loads = _measured_here(console, resolved, report.device, f"{path.stem}-device")
    place = path.with_name(f"{here.name}.yaml")
    _write(place, here.to_yaml())
    click.echo(
        f"{place.name}: {here.microbatch_ms:,.1f} ms for {here.per_gpu_batch} images by {here.model}, of them "
        f"{here.backward_ms:,.1f} ms backward, give or take {100 * here.error:.0f} %"
    )
    if loads is not None:
        _write(
            path,
            with_loader(found, loads, f"measured {today} on this machine, {resolved.recipe.data}").to_yaml(),
        )
        click.echo(f"{path.name}: a host loads {loads:,.0f} images/s")
    return 0


def _resolved(console: Console, options: Mapping[str, Any], recipe: str | None) -> Resolved:
    from hvd_lb.resolve import resolve

    with index_progress(console) as on_progress:
        return resolve(
            options, recipe=recipe, default_gpus=1, fallback_data="synthetic", on_progress=on_progress
        )


def _measured_here(
    console: Console, resolved: Resolved, device: str, name: str
) -> tuple[DeviceProfile, float | None]:
    """Of one microbatch with all cores; and images per second of the loader, if there is data to load."""
    import torch

    from hvd_lb.forecast.fit import fit_device
    from hvd_lb.simulate import measure_device

    recipe, threads = resolved.recipe, resolved.recipe.threads or usable_cores()
    with console.status(Text("measuring the device and the loader …")):
        parts, loads, _ = measure_device(
            resolved,
            device=torch.device(device),
            threads=threads,
            deadline=time.monotonic() + _SECONDS,
            loads=recipe.data != "synthetic",
        )
    return fit_device(recipe, parts, name=name, where=f"{device}, {count(threads, 'thread')}"), loads


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
