"""What the commands on trained networks take alike: which weights, on what they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from hvd_lb.report.text import printable
from hvd_lb_cli.options.kinds import THREADS

if TYPE_CHECKING:
    import torch

    from hvd_lb.trained.weights import Trained

AVERAGED = click.option("--ema", is_flag=True, help="Take the averaged weights of a run with --ema.")
_OPTIONS = (
    click.option(
        "--recipe",
        metavar="NAME|FILE",
        help="The recipe of weights that do not bring one along, a preset or a YAML file; of others it takes the "
        "place, which is told.",
    ),
    AVERAGED,
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the network runs.",
    ),
    click.option("--threads", type=THREADS, help="CPU threads [default: those of the run, else the cores]"),
)

WEIGHTS = click.argument("weights", metavar="RUN|CHECKPOINT|FILE", type=click.Path(path_type=Path))


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Ready:
    """Weights that are open, and on what they run."""

    trained: Trained
    device: torch.device
    threads: int
    loader_threads: int


def ready(weights: Path, recipe: str | None, ema: bool, device: str, threads: int | None) -> Ready:
    """As in the run, where nothing else is said: another number of threads may round otherwise."""
    import torch

    from hvd_lb.machine.cpu import usable_cores
    from hvd_lb.machine.placement import choose_device, loader_threads
    from hvd_lb.trained.weights import open_trained

    trained = open_trained(weights, recipe, averaged=ema)
    if trained.otherwise:
        told = f"warning: --recipe {recipe}, not the one that these weights bring: {'; '.join(trained.otherwise)}"
        click.echo(printable(told), err=True)
    known = trained.environment().get("threads_per_process")
    cores = usable_cores()
    number = threads or trained.recipe.threads or (known if isinstance(known, int) and known > 0 else cores)
    torch.set_num_threads(number)
    loading = loader_threads(
        trained.recipe.loader_threads, number, cores, reproducible=trained.recipe.reproducible
    )
    return Ready(trained, torch.device(choose_device(device)), number, loading)
