"""Recipe files: `field: value` lines in YAML, with nothing in them that YAML could take for something else.

PyYAML reads YAML 1.1, where 1e-4 is text, 010 is 8, 1:30 is 90, 2026-01-01 a date, and of a key that is there twice
the last one counts. Here numbers are decimal, dates are text, and a second key is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hvd_lb.errors import UserError

_MOST_BYTES = 1 << 20  # a recipe has some hundred lines
_TAG = "tag:yaml.org,2002:"
_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    # What plain words mean: as in YAML 1.1, but for numbers and dates.
    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, words) for tag, words in kinds if tag.removeprefix(_TAG) in ("bool", "null")]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem="anchors, aliases and tags (&, *, !) have no place here: put text that begins so in "
                "quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                raise yaml.MarkedYAMLError(
                    problem="expected the name of a field, then a colon", problem_mark=key.start_mark
                )
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is there twice, in lines {lines[key.value]} and {line}: remove one"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what either YAML would take for something else than text."""


for _kind, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"(?:{_pattern})$"), list("-+0123456789."))


def read_text(path: Path, what: str = "recipe") -> str:
    """The text of a recipe file, or another that is called `what`; UserError in one line for what is none."""
    try:
        if path.is_dir():
            raise UserError(f"{what} {path} is a folder: expected a YAML file")
        if not path.is_file():
            raise UserError(f"{what} {path} is a pipe or device: expected a YAML file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(
                f"{what} {path} has more than {_MOST_BYTES:,} bytes: expected `field: value` lines"
            )
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} is not UTF-8 (byte {error.start}): expected YAML; save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None


def read_named(path: Path, most: int = 1 << 26) -> bytes:
    """The first `most` bytes of what a user has named: a file, or a pipe that somebody writes to, as `<(command)` is.

    Of a pipe that nobody writes to there are none, at once. OSError.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        os.set_blocking(file.fileno(), True)
        return file.read(most)


def parse_values(text: str, source: str, what: str = "recipe") -> dict[str, Any]:
    """The fields that a text sets, whatever they are; UserError in one line for what is no `field: value` lines."""
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{what} {source}: {_in_one_line(error)}") from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{what} {source}: a number has too many digits") from None
    except RecursionError:
        raise UserError(f"{what} {source} is nested too deeply: expected `field: value` lines") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} {source}: expected `field: value` lines")
    return values


def dump_values(values: Mapping[str, Any]) -> str:
    """As `parse_values` reads it."""
    text: str = yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    return text


# Said plainer than PyYAML does, by a part of its words.
_PLAINER = {
    "found character '\\t'": "a tab, which has no place in YAML: put spaces there",
    "another document": "a second document begins: remove the line of ---",
    "special characters are not allowed": "is no plain text, or not UTF-8: save it as UTF-8",
}


def _in_one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    plainer = next((words for part, words in _PLAINER.items() if part in problem), problem)
    return f"{where}{' '.join(plainer.split())}"
