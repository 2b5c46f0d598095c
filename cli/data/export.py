"""`hvd-lb data export`: a data set as class folders."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from hvd_lb.report.text import count
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.options.splits import split_options
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.terminal import plain_console


@click.command("export")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="FOLDER", type=Target())
@split_options
def export_command(source: str, target: Path, val: str | None, val_fraction: float | None) -> None:
    """Write the data set SRC (whatever --data takes) to FOLDER/train and FOLDER/val with a folder for each class.

    Files are copied byte for byte; pixels, such as those of fashion-mnist, become PNG.

    \b
    hvd-lb data export fashion-mnist /data/fashion
    """
    from hvd_lb.data.dataset import open_dataset  # here: --help needs none of it
    from hvd_lb.data.prepare.export import export
    from hvd_lb.data.spec import spec_of
    from hvd_lb.machine.cpu import usable_cores

    with long_progress(plain_console()) as on_progress:
        dataset = open_dataset(
            source, val=val, val_fraction=val_fraction, on_progress=on_progress, on_bad_image="skip"
        )
        dataset.refuse_among_classes(target)
        folders = export(dataset, target, threads=4 * usable_cores(), on_progress=on_progress)
    click.echo(
        f"{target}: {len(dataset.train):,} training and {len(dataset.val):,} validation images in "
        f"{count(len(folders), 'class')}; train with --data {spec_of(target)}"
    )
