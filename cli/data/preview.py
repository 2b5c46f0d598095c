"""`hvd-lb data preview`: a picture of what the network will see."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from hvd_lb.recipe import Recipe
from hvd_lb_cli.options.recipe import recipe_options
from hvd_lb_cli.output.picture_file import PICTURE, write_picture
from hvd_lb_cli.output.progress import long_progress
from hvd_lb_cli.output.terminal import plain_console

if TYPE_CHECKING:
    from hvd_lb.resolve import Resolved

_EPOCHS = 4
_option = functools.partial(click.option, panel="The picture")


@click.command("preview")
@_option("--recipe", metavar="NAME|FILE", help="A preset (see `hvd-lb recipes`) or a YAML file.")
@_option(
    "--output",
    type=PICTURE,
    metavar="FILE.png",
    default="preview.png",
    show_default=True,
    help="The picture.",
)
@_option(
    "--images",
    type=click.IntRange(1, 50),
    default=4,
    show_default=True,
    help="How many training images; half as many of validation.",
)
@_option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the loader decodes.",
)
@recipe_options
def preview(options: dict[str, Any], recipe: str | None, output: Path, images: int, device: str) -> None:
    """Draw what the network will see of the first images of a run, with the options of `train`.

    Each image with the crop windows of its first epochs, beside it the tensors that the loader makes of them, and the
    view of evaluation. They are those of the run: same seed, same order, same loader.

    \b
    hvd-lb data preview --data /data/imagenet --recipe goyal-resnet50
    hvd-lb data preview --data digits --crop-scale 0.3,1 --output crops.png
    """
    import torch

    from hvd_lb.machine.placement import choose_device  # here: --help needs none of it
    from hvd_lb.report.pictures.preview import COLOURS
    from hvd_lb.report.pictures.preview import preview as draw
    from hvd_lb.report.pictures.views import views
    from hvd_lb.resolve import resolve

    on = torch.device(choose_device(device))
    with long_progress(plain_console()) as on_progress:
        resolved = resolve(options, recipe=recipe, default_gpus=1, on_progress=on_progress)
    chosen, dataset = resolved.recipe, resolved.dataset
    epochs = min(_EPOCHS, chosen.epochs, len(COLOURS))
    training = views(chosen, dataset.train, _first_images(resolved), images, epochs, on)
    evaluation = views(chosen, dataset.val, _some(len(dataset.val), chosen.seed), -(-images // 2), 0, on)
    write_picture(draw(training, evaluation, _title(resolved), _subtitle(chosen)), output)


def _first_images(resolved: Resolved) -> Iterator[int]:
    """In the order of the run's first epoch."""
    plan = resolved.plan
    for step in range(plan.steps_per_epoch):
        for worker in range(plan.workers):
            yield from plan.image_ids(0, step, worker).tolist()


def _some(images: int, seed: int) -> Iterator[int]:
    """All numbers, in a random order: neighbours are of one class."""
    from hvd_lb.plan.shuffle import Permutation

    order = Permutation(images, seed, 0)
    for position in range(images):
        yield int(order.slice(position, position + 1)[0])


def _title(resolved: Resolved) -> str:
    recipe = resolved.recipe
    size = f"{recipe.image_size} × {recipe.image_size}"
    return f"{resolved.dataset.name} as {recipe.model} sees it: {size} pixels, recipe {resolved.preset}"


def _augmentation(recipe: Recipe) -> str:
    auto = "" if recipe.auto_augment == "none" else f", {recipe.auto_augment}"
    erased = f", erased with probability {recipe.random_erasing:g}" if recipe.random_erasing else ""
    return auto + erased


def _subtitle(recipe: Recipe) -> str:
    low, high = recipe.crop_scale
    return (
        f"loader {recipe.loader}, antialias {'on' if recipe.antialias else 'off'}, windows of {100 * low:g} to "
        f"{100 * high:g} % of the area and of aspect {recipe.crop_ratio[0]:.2f} to {recipe.crop_ratio[1]:.2f}, "
        f"mirrored with probability {recipe.flip:g}{_augmentation(recipe)}, "
        f"evaluation {100 * recipe.eval_crop:g} % of the shorter side, "
        f"seed {recipe.seed}"
    )
