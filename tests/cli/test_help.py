"""Help is there at once: no command needs torch or numpy to say what it does."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import rich_click as click
from click.shell_completion import ShellComplete

from hvd_lb.recipe import Recipe
from hvd_lb_cli.commands import cli
from hvd_lb_cli.options.recipe import SECTIONS
from hvd_lb_cli.options.topics import TOPICS, TopicCommand

# In a process of its own: here torch is loaded already.
ALL_HELP = """
import contextlib, io, json, sys
from hvd_lb_cli.commands import cli
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"], prog_name="hvd-lb", standalone_mode=False)
    assert "Usage: hvd-lb" in out.getvalue(), words
    assert "\\\\b" not in out.getvalue(), words  # what click reads as "these lines as they are", mistyped
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


@pytest.mark.parametrize(("name", "most"), [("train", 66), ("simulate", 60)])
def test_help_shows_what_a_first_run_needs_and_the_rest_by_topic(
    hvd_lb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, TopicCommand)
    options = {option.opts[0] for option in command.params}
    first = hvd_lb(name, "--help")
    assert (first.status, first.err) == (0, "")
    assert first.out.count("\n") <= most
    assert "--gpus" in first.out
    assert "--momentum " not in first.out
    assert hvd_lb(name, "-h").out == first.out
    by_topic = {topic: hvd_lb(name, "--help", topic).out for topic in command.topics}
    assert "--momentum " in by_topic["optimizer"]
    assert "--last-batch" not in by_topic["optimizer"]
    for shown in ("\n".join(by_topic.values()), hvd_lb(name, "--help", "all").out):
        assert not {option for option in options if f" {option}" not in shown}
    assert hvd_lb(name, "--help").out == first.out
    wrong = hvd_lb(name, "--help", "momentum")
    assert (wrong.status, wrong.out) == (2, "")
    assert "'momentum' is none of run, data," in wrong.err


def test_each_section_of_the_recipe_is_a_topic() -> None:
    assert SECTIONS.keys() <= Recipe.model_fields.keys()
    assert {*SECTIONS.values()} <= {panel for panels in TOPICS.values() for panel in panels}


def test_a_mistyped_word_names_the_nearest(hvd_lb: Callable[..., Any]) -> None:
    assert "Did you mean" in hvd_lb("train", "--gpu", "3").err
    assert "did you mean 'status'?" in hvd_lb("statsu").err


def test_shells_complete_commands_and_options() -> None:
    def completions(*words: str) -> list[str]:
        complete = ShellComplete(cli, {}, "hvd-lb", "_HVD_LB_COMPLETE")
        return [item.value for item in complete.get_completions(list(words[:-1]), words[-1])]

    assert completions("sta") == ["status"]
    assert "--per-gpu-batch" in completions("train", "--per")
