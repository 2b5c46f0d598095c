"""`hvd-lb data`: getting data sets into the form that `--data` takes."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich.progress import Progress, TimeRemainingColumn, TransferSpeedColumn

from hvd_lb.data.prepare.imagenet import DEVKIT, ILSVRC2012, TRAIN_TAR, VAL_TAR, prepare_imagenet
from hvd_lb_cli.lazy import LazyGroup
from hvd_lb_cli.output.terminal import plain_console

_COMMANDS = {
    "index": "hvd_lb_cli.data.index:index_command",
    "info": "hvd_lb_cli.data.info:info",
    "preview": "hvd_lb_cli.data.preview:preview",
    "pack": "hvd_lb_cli.data.pack:pack_command",
    "export": "hvd_lb_cli.data.export:export_command",
    "verify": "hvd_lb_cli.data.verify:verify_command",
}
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group(cls=LazyGroup, lazy=_COMMANDS)
def data() -> None:
    """Prepare data sets, and look at them."""


@data.command(
    "prepare-imagenet",
    help=f"Unpack ImageNet as downloaded ({TRAIN_TAR}, {VAL_TAR} and {DEVKIT} in SOURCE) "
    "to TARGET/train and TARGET/val with a folder for each class. "
    "Typed again after an interruption it goes on where it was.",
)
@click.argument("source", type=_FOLDER)
@click.argument("target", type=_FOLDER)
@click.option(
    "--allow-partial", is_flag=True, help="Accept other numbers of images and classes than ILSVRC2012's."
)
def prepare_imagenet_command(source: Path, target: Path, allow_partial: bool) -> None:
    columns = (*Progress.get_default_columns()[:-1], TransferSpeedColumn(), TimeRemainingColumn())
    from hvd_lb.data.spec import spec_of  # here: --help needs none of it

    with Progress(*columns, console=plain_console(stderr=True)) as progress:
        tasks = {label: progress.add_task(f"unpacking {label}", total=None) for label in ("train", "val")}

        def show(label: str, done: int, total: int) -> None:
            progress.update(tasks[label], completed=done, total=total)

        expected = None if allow_partial else ILSVRC2012
        counts = prepare_imagenet(source, target, expected=expected, on_progress=show)
    click.echo(
        f"{target}: {counts.train:,} training and {counts.val:,} validation images in "
        f"{counts.classes:,} classes; train with --data {spec_of(target)}"
    )
