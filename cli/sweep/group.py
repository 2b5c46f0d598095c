"""`hvd-lb sweep`: many runs of one recipe, and what came of them."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from hvd_lb_cli.lazy import LazyGroup

_COMMANDS = {
    "run": "hvd_lb_cli.sweep.run:run",
    "status": "hvd_lb_cli.sweep.status:status",
    "table": "hvd_lb_cli.sweep.table:table",
    "figure": "hvd_lb_cli.sweep.figure:figure",
}


class _Sweep(LazyGroup):
    """`run` may be left out: `hvd-lb sweep --vary …`, `hvd-lb sweep FOLDER`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.list_commands(ctx):
            varies = any(word.split("=")[0] == "--vary" for word in args)
            if varies or (Path(args[0]) / "sweep.json").is_file():
                args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Sweep, lazy=_COMMANDS)
def sweep() -> None:
    """Vary fields of a recipe with several seeds, resumably, and see up to which minibatch the accuracy stays.

    \b
    hvd-lb sweep run sweeps/warmup --data digits --vary gpus=2,16 --vary warmup=gradual,none --seeds 5 --jobs 2
    hvd-lb sweep status sweeps/warmup
    hvd-lb sweep table sweeps/warmup
    hvd-lb sweep figure sweeps/warmup --output figure1.png
    """
