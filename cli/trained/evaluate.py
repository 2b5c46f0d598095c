"""`hvd-lb evaluate`: the errors of trained weights, as training tells them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import rich_click as click
from rich.text import Text

from hvd_lb.report.run_directory import strict_json
from hvd_lb.report.text import figure, printable
from hvd_lb_cli.options.splits import split_options
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.show import print_rows
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.trained.argument import WEIGHTS, network_options, ready


@click.command()
@WEIGHTS
@click.option("--data", metavar="DATA", help="What to evaluate on [default: the data of the run]")
@split_options
@click.option(
    "--split",
    type=click.Choice(["val", "train"]),
    default="val",
    show_default=True,
    help="Validation or training images; both are cut centrally.",
)
@click.option(
    "--on-bad-image",
    type=click.Choice(["fail", "skip"]),
    help="With skip, images that cannot be decoded are left out and counted. [default: as in the recipe]",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with every digit.")
@network_options
def evaluate(
    weights: Path,
    data: str | None,
    val: str | None,
    val_fraction: float | None,
    split: str,
    on_bad_image: str | None,
    as_json: bool,
    recipe: str | None,
    ema: bool,
    device: str,
    threads: int | None,
) -> None:
    """Count the errors of trained weights: a run's last ones, those of a checkpoint, or a .safetensors file's.

    The figures are those that training told, to the bit, on the same machine. Of a folder without val/ all images are
    taken; its classes are found by their names.

    \b
    hvd-lb evaluate runs/fashion
    hvd-lb evaluate runs/fashion/checkpoints/best --split train
    hvd-lb evaluate model.safetensors --data /data/test --json
    """
    from hvd_lb.data.spec import data_spec
    from hvd_lb.trained.evaluate import evaluate as evaluate_weights
    from hvd_lb.trained.evaluate import open_images

    console = plain_console(stderr=as_json)
    use = ready(weights, recipe, ema, device, threads)
    trained = use.trained
    if on_bad_image is not None:
        trained = replace(trained, recipe=trained.recipe.model_copy(update={"on_bad_image": on_bad_image}))
    spec = data_spec({"data": data}, {"data": trained.recipe.data})
    if data is None:  # the run's, with its splits
        val = val if val is not None or val_fraction is not None else trained.recipe.val
        val_fraction = (
            val_fraction if val is not None or val_fraction is not None else trained.recipe.val_fraction
        )
    with long_progress(console) as on_progress:
        what, images, notes = open_images(
            trained, spec, val=val, val_fraction=val_fraction, split=split, on_progress=on_progress
        )
    for note in notes:
        console.print(Text(printable(note)), soft_wrap=True)
    with long_progress(console) as on_progress:
        found = evaluate_weights(
            trained,
            images,
            what,
            device=use.device,
            threads=use.loader_threads,
            on_progress=lambda done: on_progress("images evaluated", done, len(images)),
        )
    figures = found.figures
    if as_json:
        told = {"weights": str(trained.file), "data": what, **asdict(figures), "left_out": len(found.bad)}
        click.echo(strict_json(told))
        return
    rows = [
        ("weights", printable(str(trained.file))),
        ("data", printable(what)),
        ("images", f"{figures.images:,}" + (f", {len(found.bad):,} left out" if found.bad else "")),
        ("top-1 error", f"{figure(figures.top1_error, '.2f')} %"),
        ("top-5 error", f"{figure(figures.top5_error, '.2f')} %"),
        ("loss", figure(figures.loss, ".4f")),
    ]
    print_rows(console, rows)
