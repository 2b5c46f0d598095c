"""`hvd-lb sweep`: many runs of one recipe, and what came of them."""

from __future__ import annotations

import rich_click as click

from hvd_lb_cli.lazy import LazyGroup

_COMMANDS = {
    "run": "hvd_lb_cli.sweep.run:run",
    "status": "hvd_lb_cli.sweep.status:status",
    "table": "hvd_lb_cli.sweep.table:table",
    "figure": "hvd_lb_cli.sweep.figure:figure",
}


@click.group(cls=LazyGroup, lazy=_COMMANDS)
def sweep() -> None:
    """Vary fields of a recipe with several seeds, resumably, and see up to which minibatch the accuracy stays.

    \b
    hvd-lb sweep run sweeps/warmup --data fashion-mnist --vary gpus=8,256 --vary warmup=gradual,none --seeds 5 --jobs 2
    hvd-lb sweep status sweeps/warmup
    hvd-lb sweep table sweeps/warmup
    hvd-lb sweep figure sweeps/warmup --output figure1.png
    """
