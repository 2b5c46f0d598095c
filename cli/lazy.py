"""Command groups whose commands are imported when asked for: `hvd-lb --help` need not wait for torch."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any

import rich_click as click
from click.exceptions import Exit

from hvd_lb.errors import nearest
from hvd_lb_cli.arguments import flags


class LazyGroup(click.RichGroup):
    """Finds commands by name in `lazy`, as "module:function"; commands added as usual come first."""

    def __init__(self, *arguments: Any, lazy: Mapping[str, str], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self._lazy]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self._lazy:
            return super().get_command(ctx, name)
        module, _, function = self._lazy[name].partition(":")
        command: click.Command = getattr(import_module(module), function)
        return command

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with _ended_as_by_sigpipe():  # `--help` and `--version` are answered here
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _ended_as_by_sigpipe():
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            name, command, rest = super().resolve_command(ctx, args)
        except click.UsageError as error:
            more = nearest(args[0], self.list_commands(ctx))
            raise click.UsageError(f"{error.message.rstrip('.')}{more}", ctx) from None
        if command:
            _refuse_options_as_values(command, rest, ctx.help_option_names)
        return name, command, rest


@contextmanager
def _ended_as_by_sigpipe() -> Iterator[None]:
    """Where the reader is gone (`| head`), click would end by 1, which of `compare` is "they differ"."""
    try:
        yield
    except BrokenPipeError:
        raise Exit(128 + signal.SIGPIPE) from None


def _refuse_options_as_values(command: click.Command, words: Sequence[str], more: Sequence[str]) -> None:
    """UsageError for `--output --resume auto`, which would write into a folder called `--resume`."""
    options = {
        flag: param for param in command.params if isinstance(param, click.Option) for flag in flags(param)
    }
    for word, following in pairwise(words):
        if word == "--":
            return
        option = options.get(word)
        takes_one = option and not (option.is_flag or option.count)
        if takes_one and following.partition("=")[0] in (*options, *more):
            raise click.UsageError(
                f"{word} has no value, as the option {following} follows: give one, or write {word}={following}"
            )
