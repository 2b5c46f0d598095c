"""`--help` of commands with a hundred options: what a first run needs, and the rest by topic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich_click as click

#: A word for `--help TOPIC`, and the panels of options that it shows.
TOPICS = {
    "run": ("The run",),
    "data": ("Data",),
    "minibatch": ("Minibatch and length",),
    "model": ("Model",),
    "schedule": ("Learning rate",),
    "optimizer": ("Optimizer",),
    "exactness": ("Exactness",),
    "speed": ("Speed",),
    "checkpoints": ("Checkpoints and records",),
    "forecast": ("A forecast",),
    "hosts": ("Where it runs",),
    "docker": ("Containers and jobs",),
    "slurm": ("Containers and jobs", "Slurm"),
    "kubernetes": ("Containers and jobs", "Kubernetes"),
}
_FIRST, _ALL = "first", "all"
_FIRST_PANEL = "What a first run needs"


class TopicCommand(click.RichCommand):
    """`--help` shows the options named in `first_options`, `--help TOPIC` those of a topic, `--help all` all."""

    def __init__(self, *arguments: Any, first_options: Iterable[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._first = frozenset(first_options)
        self._panels = {option.name: getattr(option, "panel", None) for option in self.params}
        self.topics = [topic for topic, shown in TOPICS.items() if {*shown} & {*self._panels.values()}]

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        if self._help_option is None:
            self._help_option = click.RichOption(
                ["-h", "--help"],
                is_flag=False,
                flag_value=_FIRST,
                metavar="[TOPIC]",
                is_eager=True,
                expose_value=False,
                callback=self._show,
                help="Show this message, or the options of one topic, and exit.",
                panel=_FIRST_PANEL,
            )
        return self._help_option

    def _show(self, ctx: click.Context, option: click.Parameter, topic: str | None) -> None:
        if topic is None or ctx.resilient_parsing:
            return
        if topic not in (_FIRST, _ALL, *self.topics):
            raise click.BadParameter(f"{topic!r} is none of {', '.join(self.topics)} and all", ctx, option)
        self._arrange(topic)
        more = f"More options by topic, as in `{ctx.command_path} --help {self.topics[1]}`: "
        self.epilog = f"{more}{', '.join(self.topics)}, all." if topic == _FIRST else None
        text = ctx.get_help()
        self._arrange(_ALL)
        click.echo(text, color=ctx.color)
        ctx.exit()

    def _arrange(self, topic: str) -> None:
        for option in self.get_params(click.Context(self)):
            if isinstance(option, click.RichOption):
                panel = self._panels.get(option.name, _FIRST_PANEL)
                shown = panel in TOPICS.get(topic, (panel,))
                if topic == _FIRST:
                    shown, panel = option.name in self._first or panel == _FIRST_PANEL, _FIRST_PANEL
                option.hidden, option.panel = not shown, panel
