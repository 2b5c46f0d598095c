"""`hvd-lb export`: a trained network for other programs."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich.text import Text

from hvd_lb.errors import UserError
from hvd_lb.report.text import printable
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.output.files import new_folder
from hvd_lb_cli.output.show import print_rows
from hvd_lb_cli.output.terminal import plain_console
from hvd_lb_cli.trained.argument import AVERAGED, WEIGHTS


@click.command()
@WEIGHTS
@click.option(
    "--format",
    "form",
    type=click.Choice(["torchvision", "torch-export", "onnx"]),
    required=True,
    help="Weights for torchvision's network, a program for torch.export.load, or an ONNX file.",
)
@click.option(
    "--output",
    type=Target(),
    help="Folder to write [default: in the run exported/FORMAT, of another checkpoint or with --ema "
    "exported/FORMAT-best, -ema]",
)
@click.option("--recipe", metavar="NAME|FILE", help="The recipe of weights that do not bring one along.")
@AVERAGED
def export(weights: Path, form: str, output: Path | None, recipe: str | None, ema: bool) -> None:
    """Write a trained network for other programs, with class names and a model card; load it back and compare.

    \b
    hvd-lb export runs/fashion --format torch-export
    hvd-lb export runs/imagenet/checkpoints/best --format onnx --output resnet50-onnx
    """
    from hvd_lb.trained.export import FORMATS
    from hvd_lb.trained.export import export as export_weights
    from hvd_lb.trained.weights import open_trained

    trained = open_trained(weights, recipe, averaged=ema)
    if trained.otherwise:
        raise UserError(
            f"--recipe {recipe} is not the one that these weights bring ({'; '.join(trained.otherwise)}): leave it out"
        )
    if output is None:
        if trained.run is None:
            raise UserError(f"{printable(str(weights))} is in no run directory: give --output FOLDER")
        # Each network of a run has a folder of its own.
        named = weights.expanduser().absolute()
        which = [] if named.resolve() == trained.run.path.resolve() else [named.name]
        output = trained.run.path / "exported" / "-".join([form, *which, *(["ema"] if ema else [])])
    output = new_folder(output)
    (chosen,) = (name for name in FORMATS if name == form)
    with plain_console(stderr=True).status(Text(f"exporting {trained.recipe.model}")):
        done = export_weights(trained, chosen, output)
    print_rows(
        plain_console(),
        [
            ("weights", printable(str(trained.file))),
            ("written", printable(f"{done.folder}: {', '.join(done.files)}")),
            ("loaded back", f"logits differ by at most {done.difference:.2g}, of up to {done.largest:.3g}"),
        ],
    )
