"""`hvd-lb sweep run`: the runs of a sweep, all of them or those that are left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich_click as click
from rich.text import Text

from hvd_lb.errors import UserError
from hvd_lb.report.text import count, duration, printable
from hvd_lb.track.target import refuse_untracked, track_targets
from hvd_lb_cli.options.given import given_options
from hvd_lb_cli.options.kinds import Target
from hvd_lb_cli.options.recipe import recipe_options, track_option
from hvd_lb_cli.options.topics import TopicCommand
from hvd_lb_cli.output.show import index_progress
from hvd_lb_cli.output.terminal import outliving_readers, plain_console

_FIRST = (
    *("vary", "seeds", "jobs", "train", "processes", "dry_run", "recipe", "device"),
    *("data", "model", "per_gpu_batch", "epochs", "learning_rate"),
)
_option = click.option
_TRUE, _FALSE = ("true", "on", "yes", "1"), ("false", "off", "no", "0")


@click.command(cls=TopicCommand, first_options=_FIRST)
@click.argument("folder", type=Target(), required=False)
@_option(
    "--vary",
    metavar="FIELD=VALUE,VALUE…",
    multiple=True,
    help="A field of the recipe and its values; each --vary is combined with each. Values that have commas "
    "themselves are parted by semicolons.",
    panel="The run",
)
@_option(
    "--seeds",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Runs of each point, with seeds from --seed on.",
    panel="The run",
)
@_option(
    "--jobs",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Runs at a time; they share the cores.",
    panel="The run",
)
@_option(
    "--train",
    is_flag=True,
    help="By `hvd-lb train`, on several processes; otherwise simulated, each in one process, with all steps.",
    panel="The run",
)
@_option(
    "--processes", type=click.IntRange(1, 4096), help="With --train: processes of each run.", panel="The run"
)
@_option("--dry-run", is_flag=True, help="Only tell which runs there would be.", panel="The run")
@_option("--recipe", metavar="NAME|FILE", help="A preset or a YAML file.", panel="The run")
@_option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the network runs.",
    panel="The run",
)
@track_option
@recipe_options
@click.pass_context
def run(
    context: click.Context,
    options: dict[str, Any],
    folder: Path | None,
    vary: tuple[str, ...],
    seeds: int,
    jobs: int,
    train: bool,
    processes: int | None,
    dry_run: bool,
    recipe: str | None,
    device: str,
    track: tuple[str, ...],
) -> int:
    """Take all runs of a grid over fields of a recipe; each has a run directory in FOLDER/runs.

    The same command, or `hvd-lb sweep run FOLDER` alone, goes on with what is left: runs that have ended or diverged
    are not taken again, others go on from their checkpoints. Another --vary over the same recipe adds its points.
    Without FOLDER it is in sweeps/, with a name made from the recipe.

    \b
    hvd-lb sweep run sweeps/fig1 --data fashion-mnist --vary gpus=8,32,128,256 --seeds 5 --jobs 2
    hvd-lb sweep run sweeps/fig1
    """
    from hvd_lb.sweep.plan import check_size, grown, is_sweep, open_sweep
    from hvd_lb.sweep.results import has_diverged, unfinished
    from hvd_lb.sweep.run import Commands, held

    if processes is not None and not train:
        raise UserError("--processes is for --train: a simulated run has one process")
    refuse_untracked(track_targets(track))
    console = plain_console()
    about_recipe = {"vary", "seeds", "train", "recipe", *options}
    if folder and not about_recipe & given_options(context).keys():
        folder = folder.expanduser()
        if not is_sweep(folder):
            raise UserError(
                f"{printable(str(folder))}: is no sweep to go on with; a new one takes --data, and --vary FIELD=VALUES"
            )
        sweep = open_sweep(folder)
    else:
        grid = _grid(context.command, vary, seeds)
        check_size(grid)
        base, dataset = _base(options, recipe, console)
        folder = folder.expanduser() if folder else _default_folder(base)
        dataset.refuse_among_classes(folder)
        sweep = grown(folder, base, "train" if train else "simulate").with_grid(grid)
        _check(sweep, dataset)
    _check_places(sweep, device, processes)
    points = sweep.points()
    left = unfinished(points)
    console.print(
        f"{folder}: {count(len(sweep.settings()), 'setting')}, {count(len(points), 'run')}: "
        f"{len(points) - len(left)} ended, {len(left)} to go",
        soft_wrap=True,
    )
    if dry_run:
        names = {point.name for point in left}
        for point in points:
            console.print(f"{'to go' if point.name in names else 'ended'}  {point.name}", soft_wrap=True)
        return 0
    if not left:
        return 0
    done, failed = len(points) - len(left), 0
    more = [*(("--processes", str(processes)) if processes else ()), "--device", device]
    more += [word for target in track for word in ("--track", target)]
    if sweep.base.threads is None:
        more += ["--threads", str(_threads(jobs, processes or 1))]
    commands = Commands(sweep, jobs, more)
    with outliving_readers(), held(sweep), console.status(Text()) as status:

        def on_end(ended: Any) -> None:
            nonlocal done, failed
            done += 1
            failed += bool(ended.status) and not has_diverged(ended.point)
            what = f"failed: {ended.said}" if ended.status else _figures(ended.point)
            what = "diverged" if has_diverged(ended.point) else what
            console.print(
                printable(f"{done} of {len(points)}  {ended.point.name}: {what} ({duration(ended.seconds)})"),
                soft_wrap=True,
            )

        def on_look() -> None:
            running = ", ".join(f"{name} {100 * share:.0f} %" for name, share in commands.progress().items())
            status.update(Text(f"{done} of {len(points)} ended; {running}"))

        def on_interrupt() -> None:
            console.print(
                "ending the runs, each with a checkpoint; again to end them at once; "
                f"`hvd-lb sweep run {folder}` goes on",
                soft_wrap=True,
            )

        commands.run(left, on_end, on_look if console.is_terminal else lambda: None, on_interrupt)
    if failed:
        console.print(f"{count(failed, 'run')} failed; logs are in {folder / 'logs'}", soft_wrap=True)
    console.print(f"`hvd-lb sweep table {folder}` tells what came of it", soft_wrap=True)
    return 1 if failed else 0


def _base(options: dict[str, Any], recipe: str | None, console: Any) -> tuple[Any, Any]:
    """The recipe that is varied, and its data."""
    from hvd_lb.resolve import resolve

    with index_progress(console) as on_progress:
        resolved = resolve(options, recipe=recipe, default_gpus=1, on_progress=on_progress)
    return resolved.recipe, resolved.dataset


def _default_folder(base: Any) -> Path:
    from hvd_lb.launch.session import default_output

    return Path("sweeps") / default_output(base).name


def _check(sweep: Any, dataset: Any) -> None:
    """What cannot work is told before anything starts; UserError with the setting."""
    from hvd_lb.resolve import begins_anew, check_with_data, refuse_unread

    read = set()
    for setting in sweep.settings():
        recipe = sweep.recipe(setting)
        with _naming(setting):
            refuse_unread(recipe, setting.values)
            check_with_data(recipe, dataset)
            if recipe.init_from and (begins := (recipe.init_from, recipe.model)) not in read:
                begins_anew(recipe, dataset)
                read.add(begins)


def _check_places(sweep: Any, device: str, processes: int | None) -> None:
    """UserError, with the setting, where this machine cannot take its runs so."""
    from hvd_lb.machine.placement import choose_device, choose_placement

    where = choose_device(device)
    for setting in sweep.settings():
        recipe = sweep.recipe(setting)
        with _naming(setting):
            choose_placement(
                where,
                gpus=recipe.gpus,
                processes=processes if sweep.mode == "train" else 1,
                threads=recipe.threads,
                group=recipe.fixed_group,
            )


@contextmanager
def _naming(setting: Any) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting.name}: {error}") from None


def _threads(jobs: int, processes: int) -> int:
    from hvd_lb.machine.cpu import usable_cores

    return max(1, usable_cores() // (jobs * processes))


def _figures(point: Any) -> str:
    from hvd_lb.sweep.results import error_in_words, error_of

    error = error_of(point)
    return "ended" if error is None else error_in_words(point, error)


def _grid(command: click.Command, vary: tuple[str, ...], seeds: int) -> Any:
    from hvd_lb.sweep.plan import Grid

    values: dict[str, tuple[Any, ...]] = {}
    for text in vary:
        field, of_field = _values(command, text)
        if field in values:
            raise UserError(f"--vary {text}: {field} was given before; give all of its values in one --vary")
        values[field] = of_field
    return Grid(values, seeds)


def _values(command: click.Command, text: str) -> tuple[str, tuple[Any, ...]]:
    """gpus=8,32 as ("gpus", (8, 32)), each value as the field's own option takes it."""
    from hvd_lb.sweep.plan import check_vary

    name, equals, values = text.partition("=")
    if not equals or not values:
        raise UserError(f"--vary {text}: expected FIELD=VALUE,VALUE, such as gpus=8,32,128")
    field = check_vary(name)
    (option,) = (option for option in command.params if option.name == field)
    listed = option.type.name == "numbers"
    parts = [part.strip() for part in values.split(";" if listed or ";" in values else ",")]
    found = tuple(dict.fromkeys(_value(option, part, text) for part in parts))
    return field, found


def _value(option: click.Parameter, part: str, text: str) -> Any:
    from hvd_lb.recipe import OPTIONS, Recipe, check_fields
    from hvd_lb.sweep.plan import NONE

    field = str(option.name)
    value: Any
    unset = Recipe.model_fields[field].default
    if not part:
        raise UserError(f"--vary {text}: expected a value between two commas")
    if part == NONE and unset in (None, ()):
        return unset
    if option.type is click.BOOL or getattr(option, "is_flag", False):
        if part.lower() not in (*_TRUE, *_FALSE):
            raise UserError(f"--vary {text}: {part!r} is neither true nor false")
        value = part.lower() in _TRUE
    elif field == "init_from" or (field == "class_weights" and part != "balanced"):
        value = str(Path(part).expanduser().absolute())
    else:
        try:
            value = option.type.convert(part, option, None)
        except click.BadParameter as error:
            raise UserError(f"--vary {text}: {error.message}") from None
    check_fields({field: value}, OPTIONS)
    return value
