"""Trained weights on disk, and what is needed to use them: recipe, class names, where they come from.

A run's model.safetensors is enough by itself: `hvd_lb` in its metadata is JSON with the classes, in the order of the
outputs, and the fields of the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_lb import arithmetic
from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe, differing_fields, load_values, make_recipe, merged_recipe
from hvd_lb.report.run_directory import RunDirectory, read_json
from hvd_lb.report.text import printable
from hvd_lb.training import pointers
from hvd_lb.training.checkpoint import (
    METADATA,
    Checkpoint,
    classes_of,
    load_tensors,
    open_checkpoint,
    weights_metadata,
)
from hvd_lb.training.models import build_model, input_problem, last_weight, load_weights, without_auxiliary

# What of a recipe an evaluation or prediction depends on.
_USED = (
    *("model", "image_size", "eval_size", "eval_crop", "mean", "std", "antialias"),
    *("loader", "max_pixels", "precision"),
)
# A header that readers of safetensors take has at most 100 MB.
_MOST_METADATA = 20_000_000


def metadata_of(recipe: Recipe, classes: Sequence[str]) -> dict[str, str]:
    """What model.safetensors says of itself; names that would be too much for its readers are left out."""
    # The memory order decides how logits round.
    told: dict[str, Any] = {"recipe": {**recipe.mathematics(), "channels_last": recipe.channels_last}}
    named = {**told, "classes": list(classes)} if classes else told
    text = json.dumps(named)
    return {METADATA: text if len(text) <= _MOST_METADATA else json.dumps(told)}


@dataclass(frozen=True)
class Trained:
    """Weights in `file` and what is known of them: `classes` are None where nothing names them.

    `own` is the mathematics of the recipe that they bring along, if they do; `recipe` may be another that was named.
    `checkpoint` and `run` are those that the file belongs to, if it does.
    """

    file: Path
    recipe: Recipe
    classes: list[str] | None
    checkpoint: Checkpoint | None = None
    run: RunDirectory | None = None
    own: dict[str, Any] | None = None

    @property
    def otherwise(self) -> list[str]:
        """In what of a use `recipe` differs from the one that they bring along, as "name: a → b"."""
        if self.own is None:
            return []
        recipes = self.own, self.recipe.mathematics()
        return differing_fields(*({name: of[name] for name in _USED if name in of} for of in recipes))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        return load_tensors(self.file)

    @cached_property
    def outputs(self) -> int:
        """Of the network; by its last layer where the recipe leaves it to the data. UserError where it lacks that."""
        if known := self.recipe.num_classes or len(self.classes or ()):
            return known
        head = last_weight(self.recipe.model)
        if head not in self.tensors:
            raise UserError(
                f"{printable(str(self.file))} does not hold the weights of {self.recipe.model} (it has no {head}): "
                "name the recipe they were trained by with --recipe"
            )
        return len(self.tensors[head])

    @property
    def averaged(self) -> bool:
        """Whether these are the averaged weights of a checkpoint."""
        return self.checkpoint is not None and self.file == self.checkpoint.averaged

    def class_name(self, label: int) -> str:
        return self.classes[label] if self.classes and label < len(self.classes) else str(label)

    def network(self, device: torch.device) -> nn.Module:
        """In evaluation mode. UserError where these are not the recipe's weights, or its images are none for them."""
        model = build_model(self.recipe.model, self.outputs, seed=0, zero_gamma=self.recipe.zero_gamma)
        try:
            load_weights(model, without_auxiliary(model, self.tensors))
        except RuntimeError as error:
            first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
            raise UserError(
                f"{printable(str(self.file))} does not hold the weights of {self.recipe.model} with {self.outputs} "
                f"outputs ({' '.join(first.split())[:200]}): name the recipe they were trained by with --recipe"
            ) from None
        size = self.recipe.evaluation_size
        if self.checkpoint is None and (problem := input_problem(self.recipe.model, self.outputs, size, 2)):
            raise UserError(
                f"{self.recipe.model} cannot take images of {size}×{size} pixels ({problem}): give the image_size that "
                "the weights were trained with in --recipe"
            )
        model.to(device, arithmetic.dtype(self.recipe))
        return model.to(memory_format=arithmetic.memory_format(self.recipe)).eval()

    def environment(self) -> dict[str, Any]:
        """Of the run, as environment.json has it; empty where there is none."""
        return read_json(self.run.environment) if self.run else {}


def open_trained(path: Path, recipe: str | None = None, *, averaged: bool = False) -> Trained:
    """The weights that `path` names: a run directory (its last checkpoint), a checkpoint, or a safetensors file.

    `recipe`, a preset or YAML file, stands for that of a file without one. With `averaged` those of a run with --ema.
    UserError where something is missing.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(
            f"{printable(str(path))} is not there: expected a run, a checkpoint or a .safetensors file"
        )
    if path.is_file() and not pointers.followed(path).is_dir():
        if averaged:
            raise UserError(
                f"--ema with {printable(str(path))}: it is one network; name a run or a checkpoint"
            )
        return _of_file(path, recipe)
    in_run = path / "checkpoints"
    if in_run.is_dir() or RunDirectory(path).recipe.is_file():
        if not pointers.followed(in_run / "last").is_dir():
            raise UserError(f"{printable(str(path))} has no checkpoint yet: nothing is trained in it")
        path = in_run / "last"
    elif not (pointers.followed(path) / "state.json").is_file():
        raise UserError(
            f"{printable(str(path))} is neither a run nor a checkpoint: expected a folder with checkpoints/ or "
            "state.json"
        )
    checkpoint = open_checkpoint(path)
    run = _run_of(checkpoint.path)
    file = checkpoint.averaged if averaged else checkpoint.path / "model.safetensors"
    if file is None:
        raise UserError(
            f"{printable(str(checkpoint.path))} has no averaged weights: it was trained without --ema"
        )
    own = make_recipe(checkpoint.saved.recipe, str(checkpoint.path))
    if run:  # which has the free fields too
        stored = make_recipe(load_values(str(run.recipe)), str(run.recipe))
        own = stored if stored.mathematics() == own.mathematics() else own
    classes = classes_of(weights_metadata(file))
    return Trained(file, _given(recipe) or own, classes, checkpoint, run, own.mathematics())


def _of_file(file: Path, recipe: str | None) -> Trained:
    metadata = weights_metadata(file)
    of = _given(recipe)
    if of is None:
        if "recipe" not in metadata:
            raise UserError(
                f"{printable(str(file))} does not say which network it is of: give --recipe NAME|FILE with its model, "
                "image_size and num_classes"
            )
        of = make_recipe(metadata["recipe"], str(file))
    return Trained(file, of, classes_of(metadata), own=metadata.get("recipe"))


def _given(recipe: str | None) -> Recipe | None:
    return merged_recipe({recipe: load_values(recipe)}) if recipe else None


def _run_of(checkpoint: Path) -> RunDirectory | None:
    run = RunDirectory(checkpoint.parent.parent)
    return run if checkpoint.parent == run.checkpoints and run.recipe.is_file() else None
