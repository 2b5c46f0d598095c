"""Help is there at once: no command needs torch or numpy to say what it does."""

import json
import subprocess
import sys

import rich_click as click

from hvd_lb_cli.commands import cli

# In a process of its own: here torch is loaded already.
ALL_HELP = """
import contextlib, io, json, sys
from hvd_lb_cli.commands import cli
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"], prog_name="hvd-lb", standalone_mode=False)
    assert "Usage: hvd-lb" in out.getvalue(), words
    heavy = {"torch", "torchvision", "nvidia.dali", "horovod", "numpy"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def commands(group: click.Group, *words: str) -> list[list[str]]:
    """The words of the group and of every command in it."""
    found = [list(words)]
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        found += commands(command, *words, name) if isinstance(command, click.Group) else [[*words, name]]
    return found


def test_no_help_needs_torch() -> None:
    every = commands(cli)
    assert ["train"] in every
    assert ["data", "prepare-imagenet"] in every
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, json.dumps(every)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
