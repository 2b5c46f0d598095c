"""Options that were given and that nothing would read: they are refused, as whoever gives one counts on it."""

from __future__ import annotations

from collections.abc import Collection

import rich_click as click
from click.core import ParameterSource

from hvd_lb.errors import UserError


def given_options(context: click.Context) -> dict[str, str]:
    """Parameters that were typed, by name, as they are written: {"ssh_port": "--ssh-port"}."""
    return {
        option.name: option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    }


def refuse_options(context: click.Context, names: Collection[str], why: str) -> None:
    """UserError for the first of these that was typed: "--budget …", and why it has no meaning here."""
    for name, option in given_options(context).items():
        if name in names:
            raise UserError(f"{option} {why}")
