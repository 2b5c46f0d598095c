"""The command line's options: one for each field of a recipe, made from the field, and those of the hardware."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import rich_click as click
from pydantic.fields import FieldInfo

from hvd_lb.recipe import Recipe
from hvd_lb_cli.options.kinds import Target

_HIDDEN = {"description"}
_NOT_GIVEN = None
# The panels of `--help`, each from the field that it begins with.
SECTIONS = {
    "data": "Data",
    "gpus": "Minibatch and length",
    "model": "Model",
    "learning_rate": "Learning rate",
    "optimizer": "Optimizer",
    "reproducible": "Exactness",
    "threads": "Speed",
    "eval_every": "Checkpoints and records",
}


class _Choice(click.ParamType[Any]):
    """One of the values of a Literal, whatever their type."""

    name = "choice"

    def __init__(self, values: tuple[Any, ...]):
        self._values = {str(value): value for value in values}

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "|".join(self._values)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) not in self._values:
            self.fail(f"{value!r} is not one of {', '.join(self._values)}", param, ctx)
        return self._values[str(value)]


class _Numbers(click.ParamType[Any]):
    """Numbers of a kind with commas between them."""

    name = "numbers"

    def __init__(self, kind: type[float]):
        self._kind = kind

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NUMBER,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            what, such = ("whole numbers", "128,160") if self._kind is int else ("numbers", "0.08,1")
            self.fail(f"{value!r} is not {what} with commas between them, such as {such}", param, ctx)


class _NumberOr(click.ParamType[Any]):
    """A whole number, or a word."""

    name = "number or word"

    def __init__(self, word: str):
        self._word = word

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"{self._word}|INTEGER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == self._word:
            return self._word
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither {self._word} nor a whole number", param, ctx)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option per field of a recipe; the command gets those that were given as `options`, a dict."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> Any:
        names = [name for name in Recipe.model_fields if name not in _HIDDEN]
        options = {name: value for name in names if (value := arguments.pop(name)) is not _NOT_GIVEN}
        return command(options=options, **arguments)

    decorated: Callable[..., Any] = wrapper
    panel, options = "", []
    for name, field in Recipe.model_fields.items():
        panel = SECTIONS.get(name, panel)
        if name not in _HIDDEN:
            options.append(_field_option(name, field, panel))
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


_run_option = functools.partial(click.option, panel="The run")
track_option = _run_option(
    "--track",
    multiple=True,
    metavar="TRACKER",
    help="Also tell mlflow[:URI], wandb[:PROJECT] or tensorboard[:FOLDER] of the run; may be repeated. "
    "docs/tracking.md",
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of `train` and `simulate` that are not fields of a recipe."""
    for option in reversed(
        (
            _run_option(
                "--recipe", metavar="NAME|FILE", help="A preset (see `hvd-lb recipes`) or a YAML file."
            ),
            _run_option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Where the network runs.",
            ),
            _run_option(
                "--output",
                type=Target(),
                help="Run directory [default: runs/ and a name made from the recipe]",
            ),
            _run_option(
                "--resume",
                metavar="auto|PATH",
                default="auto",
                show_default=True,
                help="Go on from the newest intact checkpoint in the run directory, or from this one.",
            ),
            track_option,
        )
    ):
        command = option(command)
    return command


def _field_option(name: str, field: FieldInfo, panel: str) -> Callable[..., Any]:
    flag = "--" + name.replace("_", "-")
    kind = _bare(field.annotation)
    note = (
        ""
        if field.default is None or "[default" in (field.description or "")
        else _default_note(field.default)
    )
    settings: dict[str, Any] = {
        "default": _NOT_GIVEN,
        "help": f"{field.description}{note}",
        "panel": panel,
    }
    if kind is bool:
        return click.option(f"{flag}/--no-{name.replace('_', '-')}", **settings)
    if get_origin(kind) is Literal:
        return click.option(flag, type=_Choice(get_args(kind)), **settings)
    if parts := [part for part in get_args(kind) if get_origin(part) is Literal]:
        return click.option(flag, type=_NumberOr(*get_args(parts[0])), **settings)
    if str in get_args(kind):
        return click.option(flag, type=str, **{**settings, "metavar": "balanced|FILE"})
    if get_origin(kind) is tuple:
        return click.option(flag, type=_Numbers(get_args(kind)[0]), **settings)
    return click.option(flag, type=kind, **settings)


def _default_note(default: Any) -> str:
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, tuple):
        default = ",".join(f"{number:g}" for number in default)
    return f" [{default}]"


def _bare(annotation: Any) -> Any:
    """int for `int | None`, str for an annotated str."""
    options = [part for part in get_args(annotation) if part is not type(None)]
    return options[0] if len(options) == 1 and get_origin(annotation) not in (Literal, tuple) else annotation
