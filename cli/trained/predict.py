"""`hvd-lb predict`: what a trained network sees in images."""

from __future__ import annotations

import sys
from pathlib import Path

import rich_click as click
from rich import box
from rich.table import Table
from rich.text import Text

from hvd_lb.report.run_directory import strict_json
from hvd_lb.report.text import printable
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.trained.argument import WEIGHTS, network_options, ready


@click.command()
@WEIGHTS
@click.argument("images", metavar="IMAGE…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--top", type=click.IntRange(1, 1000), default=5, show_default=True, help="Classes told of each image."
)
@click.option(
    "--json", "as_json", is_flag=True, help="JSON lines also on a terminal; elsewhere they are usual."
)
@network_options
def predict(
    weights: Path,
    images: tuple[Path, ...],
    top: int,
    as_json: bool,
    recipe: str | None,
    ema: bool,
    device: str,
    threads: int | None,
) -> None:
    """Tell the likeliest classes of image files, or of all in a folder: a table, or JSON lines when piped.

    \b
    hvd-lb predict runs/fashion shoe.png
    hvd-lb predict runs/fashion/checkpoints/best photos/ | jq -r '[.image, .top[0].class] | @tsv'
    """
    from hvd_lb.trained.predict import ImageFiles, find_images
    from hvd_lb.trained.predict import predict as predict_images

    found = ImageFiles(find_images(images))
    use = ready(weights, recipe, ema, device, threads)
    name = use.trained.class_name
    predictions = predict_images(use.trained, found, top, device=use.device, threads=use.loader_threads)
    if as_json or not sys.stdout.isatty():
        for prediction in predictions:
            likeliest = [
                {"class": name(label), "label": label, "probability": share}
                for label, share in prediction.top
            ]
            click.echo(strict_json({"image": prediction.image, "top": likeliest}))
        return
    table = Table("image", "class", "probability", box=box.SIMPLE_HEAD)
    for prediction in predictions:
        for rank, (label, share) in enumerate(prediction.top):
            image = printable(prediction.image) if rank == 0 else ""
            last = rank == len(prediction.top) - 1
            table.add_row(
                Text(image, overflow="fold"), printable(name(label)), f"{100 * share:.1f} %", end_section=last
            )
    plain_console().print(table)
