"""Which runs a sweep is made of: grids over fields of one recipe, each point with several seeds; `sweep.json`.

A sweep grows: further grids over the same recipe add their points to those that are there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from hvd_lb.errors import UserError, nearest
from hvd_lb.recipe import FREE_FIELDS, Recipe, differing_fields, make_recipe
from hvd_lb.report.run_directory import RunDirectory, write_json
from hvd_lb.report.text import printable

Mode = Literal["simulate", "train"]

# What all points have in common: seeds are counted by themselves, and data would be another experiment.
_COMMON = {"data", "val", "val_fraction", "num_classes"}
_MOST_POINTS = 100_000
NONE = "none"  # the value of a field that is not set
_AS_IT_IS = "as it is"  # the setting in which nothing is varied


@dataclass(frozen=True)
class Grid:
    """Values of fields, each combined with each, and how many seeds every combination has."""

    vary: Mapping[str, tuple[Any, ...]]
    seeds: int


@dataclass(frozen=True)
class Setting:
    """One combination of values, as (field, value); runs of it differ in their seeds alone."""

    chosen: tuple[tuple[str, Any], ...]

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.chosen)

    @property
    def name(self) -> str:
        """As a person reads it, and as `Sweep.setting` finds it."""
        return ", ".join(f"{name}={text_of(value)}" for name, value in self.values.items()) or _AS_IT_IS


@dataclass(frozen=True)
class Point:
    """A run of a sweep."""

    setting: Setting
    recipe: Recipe
    folder: Path  #: of the sweep

    @cached_property
    def name(self) -> str:
        words = [f"{name}={_in_name(value)}" for name, value in self.setting.values.items()]
        return re.sub(r"[^A-Za-z0-9=.,_+-]+", "-", ",".join([*words, f"seed={self.recipe.seed}"]))

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.folder / "runs" / self.name)

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipes" / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        """What the command of the run printed."""
        return self.folder / "logs" / f"{self.name}.log"


@dataclass(frozen=True)
class Sweep:
    """Grids over `base`, in `folder`; `mode` is the command that takes the steps."""

    folder: Path
    base: Recipe
    mode: Mode
    grids: tuple[Grid, ...] = field(default=())

    @cached_property
    def _known(self) -> dict[Setting, tuple[Recipe, int]]:
        """All settings, in their order, without repetition: the recipe of the first seed, and the number of seeds."""
        found: dict[str, tuple[Setting, Recipe, int]] = {}
        for grid in self.grids:
            for values in itertools.product(*grid.vary.values()):
                setting = Setting(tuple(zip(grid.vary, values, strict=True)))
                recipe = self._recipe(setting, self.base.seed)
                setting, recipe, seeds = found.get(same := recipe.digest(), (setting, recipe, 0))
                found[same] = setting, recipe, max(seeds, grid.seeds)
        return {setting: (recipe, seeds) for setting, recipe, seeds in found.values()}

    def settings(self) -> dict[Setting, int]:
        """All, and the number of seeds of each."""
        return {setting: seeds for setting, (_, seeds) in self._known.items()}

    def recipe(self, setting: Setting) -> Recipe:
        """Of its first seed."""
        return self._known[setting][0]

    def points(self) -> list[Point]:
        """All runs: of the first seed all settings, then of the next, so that every setting is seen early."""
        settings = self.settings()
        return [
            self._point(setting, number)
            for number in range(max(settings.values(), default=0))
            for setting, seeds in settings.items()
            if number < seeds
        ]

    def points_of(self, setting: Setting) -> list[Point]:
        return [self._point(setting, number) for number in range(self._known[setting][1])]

    def fields(self) -> list[str]:
        """Those that are varied, in their order."""
        return list(dict.fromkeys(name for grid in self.grids for name in grid.vary))

    def setting(self, text: str) -> Setting:
        """The setting that is written so: "gpus=8, warmup=none"; fields that are left out are those of the recipe."""
        wanted: dict[str, str] = {}
        for part in text.split(",") if text.strip() != _AS_IT_IS else ():
            name, equals, value = map(str.strip, part.partition("="))
            if not equals:
                raise UserError(f"{text!r}: expected FIELD=VALUE for {part.strip()!r}, such as gpus=8")
            if name not in self.fields():
                raise UserError(f"{text!r}: {name} is not varied here{nearest(name, self.fields())}")
            if name in wanted:
                raise UserError(f"{text!r}: {name} is given twice; expected one value of each field")
            wanted[name] = value
        of_recipe = {name: text_of(self._base_value(name)) for name in self.fields()}
        written = {
            setting: {name: text_of(self.value(setting, name)) for name in self.fields()}
            for setting in self.settings()
        }
        found = [setting for setting, values in written.items() if values == of_recipe | wanted] or [
            setting for setting, values in written.items() if wanted.items() <= values.items()
        ]
        if len(found) != 1:
            known = "; ".join(setting.name for setting in self.settings())
            several = "several settings are so" if found else "no setting is so"
            raise UserError(f"{text!r}: {several}: expected one of: {known}")
        return found[0]

    def differs_in(self, setting: Setting) -> set[str]:
        """The fields in which it is not as the recipe."""
        return {name for name, value in setting.chosen if text_of(value) != text_of(self._base_value(name))}

    def value(self, setting: Setting, name: str) -> Any:
        return setting.values.get(name, self._base_value(name))

    def _base_value(self, name: str) -> Any:
        return getattr(self.base, name)

    def with_grid(self, grid: Grid) -> Sweep:
        return self if grid in self.grids else replace(self, grids=(*self.grids, grid))

    def _point(self, setting: Setting, number: int) -> Point:
        of_first = self.recipe(setting)
        recipe = self._recipe(setting, of_first.seed + number) if number else of_first
        return Point(setting, recipe, self.folder)

    def _recipe(self, setting: Setting, seed: int) -> Recipe:
        of_base = self.base.model_dump(mode="json")
        return make_recipe({**of_base, **setting.values, "seed": seed}, f"{setting.name}, seed {seed}")

    def save(self) -> None:
        write_json(
            _file(self.folder),
            {
                "mode": self.mode,
                "grids": [{"vary": dict(grid.vary), "seeds": grid.seeds} for grid in self.grids],
                "recipe": self.base.model_dump(mode="json"),
            },
        )


def open_sweep(folder: Path) -> Sweep:
    """UserError where there is none."""
    file = _file(folder)
    try:
        content = json.loads(file.read_bytes())
        grids = tuple(
            Grid(
                {name: tuple(map(_hashable, values)) for name, values in grid["vary"].items()},
                int(grid["seeds"]),
            )
            for grid in content["grids"]
        )
        if content["mode"] not in get_args(Mode):
            raise ValueError("no such mode")
        return Sweep(folder, make_recipe(content["recipe"], str(file)), content["mode"], grids)
    except FileNotFoundError:
        raise UserError(
            f"{printable(str(folder))} holds no sweep: `hvd-lb sweep run FOLDER --vary FIELD=VALUE,VALUE` begins one"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged: restore it, or choose another folder") from None


def is_sweep(folder: Path) -> bool:
    return _file(folder).is_file()


def grown(folder: Path, base: Recipe, mode: Mode) -> Sweep:
    """The sweep in `folder`, or a new one. UserError where it is over another recipe or holds something else."""
    if not is_sweep(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{printable(str(folder))} holds something that is no sweep: choose a new folder")
        return Sweep(folder, base, mode)
    there = open_sweep(folder)
    differing = differing_fields(there.base.mathematics(), base.mathematics())
    for name in ("data", "init_from"):  # free fields, as a run that goes on may find them elsewhere
        before, now = getattr(there.base, name), getattr(base, name)
        if before != now:
            differing.append(f"{name}: {before} → {now}")
    if base.steps is not None and (there.base.steps is None or base.steps < there.base.steps):
        differing.append(f"steps: {text_of(there.base.steps)} → {base.steps}")  # its runs have taken more
    if there.mode != mode:
        differing.append(f"{there.mode} → {mode}")
    if differing:
        raise UserError(
            f"{printable(str(folder))} is a sweep over another recipe ({'; '.join(differing)}): give the same options "
            "again, or choose another folder"
        )
    return replace(there, base=base)


def check_vary(name: str) -> str:
    """The field's name. UserError where it cannot be varied."""
    known = name.strip().replace("-", "_")
    if known not in Recipe.model_fields:
        raise UserError(f"--vary {name}: no field of a recipe{nearest(known, Recipe.model_fields)}")
    if known == "seed":
        raise UserError("--vary seed: give --seeds N, which repeats every point with N seeds")
    if known in _COMMON:
        raise UserError(f"--vary {name}: a sweep is over one data set; give each a sweep of its own")
    if known in FREE_FIELDS - {"init_from"}:  # which counts at the start alone
        raise UserError(
            f"--vary {name}: may change while a run goes on, so runs that differ in it alone are the same run"
        )
    return known


def check_size(grid: Grid) -> None:
    points = grid.seeds
    for values in grid.vary.values():
        points *= len(values)
    if points > _MOST_POINTS:
        raise UserError(f"{points:,} runs in one grid: expected at most {_MOST_POINTS:,}")


def _file(folder: Path) -> Path:
    return folder / "sweep.json"


def _in_name(value: Any) -> str:
    """Of a run: of a path its last part, and a digest, as others may end so, too."""
    text = text_of(value)
    if not text.startswith("/"):
        return text
    return f"{Path(text).name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def text_of(value: Any) -> str:
    """A field's value as it is written in names and tables."""
    if value is None or value == ():
        return NONE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")  # every digit: names of runs are made of it
    return "+".join(map(text_of, value)) if isinstance(value, tuple | list) else str(value)
