"""`hvd-lb recipes`: the presets, and one of them with every field filled in."""

from __future__ import annotations

import rich_click as click
from rich.table import Table

from hvd_lb.recipe import LEFT_TO_THE_MACHINE, load_values, make_recipe, preset_names
from hvd_lb_cli.output.terminal import plain_console


@click.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the preset recipes, or show one whole (NAME, or a YAML file).

    \b
    hvd-lb recipes
    hvd-lb recipes goyal-resnet50 > mine.yaml
    """
    if name:
        values = load_values(name)
        # What the preset leaves to the machine stays open, so that the text can be used as a recipe.
        click.echo(make_recipe(values, name).to_yaml(leave_out=LEFT_TO_THE_MACHINE - set(values)), nl=False)
        return
    table = Table("recipe", "model", "pixels", "epochs", "for", box=None)
    for preset in preset_names():
        recipe = make_recipe(load_values(preset), preset)
        table.add_row(preset, recipe.model, str(recipe.image_size), str(recipe.epochs), recipe.description)
    plain_console().print(table)
