"""Command lines that go further than this process: to where they run in the end, or into a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import rich_click as click

from hvd_lb.data.remote.address import without_query


def flags(option: click.Option) -> list[str]:
    """All that it is written as: --pin and --no-pin."""
    return [*option.opts, *option.secondary_opts]


def forwarded_arguments(
    arguments: Sequence[str], command: click.Command, without: Iterable[str]
) -> list[str]:
    """`arguments` of `command` without the options named in `without` (as parameters: ssh_port) and their values."""
    options = {
        flag: option
        for option in command.params
        if isinstance(option, click.Option)
        for flag in flags(option)
    }
    dropped = set(without)
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag, equals, _ = word.partition("=")
        option = options.get(flag)
        taken = [word]
        if option and not option.is_flag and not equals and rest:
            taken.append(rest.pop(0))
        if option is None or option.name not in dropped:
            kept += taken
    return kept


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """`arguments` as others may read them: of --env NAME=VALUE the name alone, of signed URLs no query."""
    shown = list(map(without_query, arguments))
    for i, word in enumerate(shown):
        if word.startswith("--env="):
            shown[i] = "=".join(word.split("=")[:2])
        elif i and shown[i - 1] == "--env":
            shown[i] = word.partition("=")[0]
    return shown
