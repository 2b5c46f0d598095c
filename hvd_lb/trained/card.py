"""A model card: what a trained network is, how well it does and on what, how to use it and how to train it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from hvd_lb.recipe import Recipe
from hvd_lb.report.text import count, figure, printable
from hvd_lb.trained.weights import Trained

_NAMED_CLASSES = 50


@dataclass(frozen=True)
class Loading:
    """How a program gets the network: the library, and Python that has `x`, images, and ends with their `logits`."""

    library: str
    code: str


def model_card(trained: Trained, loading: Loading) -> str:
    """In Markdown."""
    recipe = trained.recipe
    parts = [
        f"# {recipe.model}" + (f", trained on {_data(recipe)}" if trained.own else ""),
        _what(trained),
        "## Results",
        _results(trained),
        "## Using it",
        _preprocessing(recipe),
        f"With {loading.library}:\n\n```python\n{loading.code}\nprobabilities = logits.softmax(1)\n```"
        if "onnxruntime" not in loading.code
        else f"With {loading.library}:\n\n```python\n{loading.code}\n```",
        "The outputs are logits, in the order of `classes.txt`.",
        *(("## Data", _provenance(trained), "## Repeating it", _repeat(trained)) if trained.own else ()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(recipe: Recipe) -> str:
    return printable((recipe.data or "data that are not named").rstrip("/").rpartition("/")[2])


def _what(trained: Trained) -> str:
    names = trained.classes or []
    listed = f": {', '.join(map(printable, names))}" if 0 < len(names) <= _NAMED_CLASSES else ""
    if not trained.own:
        return (
            f"An image classifier with {trained.outputs:,} classes{listed}. How it was trained, and on what, its file "
            "does not say."
        )
    recipe = trained.recipe
    kind = "averaged weights (`ema`)" if trained.averaged else "weights"
    after = f" after {trained.checkpoint.step:,} steps" if trained.checkpoint else ""
    return (
        f"An image classifier with {trained.outputs:,} classes{listed}. These are the {kind}{after} of a training by "
        f"hvd-lb of {recipe.epochs} epochs with minibatches of {recipe.gpus} × {recipe.per_gpu_batch} = "
        f"{recipe.global_batch:,} images."
    )


def _results(trained: Trained) -> str:
    found = trained.checkpoint.evaluation if trained.checkpoint else None
    if not found:
        return "No evaluation of these weights is known: `hvd-lb evaluate` makes one."
    if trained.averaged:
        found = {**found, **{name: found[f"ema_{name}"] for name in ("top1_error", "top5_error", "loss")}}
    return (
        "On the validation images, each counted once, one central crop:\n\n"
        "| top-1 error | top-5 error | loss | images |\n|---|---|---|---|\n"
        f"| {figure(found['top1_error'], '.2f')} % | {figure(found['top5_error'], '.2f')} % | "
        f"{figure(found['loss'], '.4f')} | {found['images']:,} |\n\n"
        "The weights were not chosen by these images unless it is the checkpoint `best`; the recipe may have been."
    )


def _preprocessing(recipe: Recipe) -> str:
    def listed(values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    size, smooth = recipe.evaluation_size, "with" if recipe.antialias else "without"
    side = "" if recipe.eval_crop == 1 else f" whose side is {recipe.eval_crop:g} of the shorter side"
    return (
        f"`x` is float32 of shape (batch, 3, {size}, {size}), RGB: of each image the central square{side}, "
        f"resized to {size} × {size} (bilinear, {smooth} antialiasing), "
        f"scaled to 0 … 1, less the mean ({listed(recipe.mean)}) and divided by ({listed(recipe.std)}). EXIF "
        "orientation is ignored."
    )


def _provenance(trained: Trained) -> str:
    checkpoint = trained.checkpoint
    print_of = f" Their fingerprint is `{checkpoint.saved.data}`." if checkpoint else ""
    held = f", of which {trained.recipe.val_fraction:g} were held out" if trained.recipe.val_fraction else ""
    return (
        f"Trained on `{printable(trained.recipe.data or 'data that are not named')}`{held}.{print_of} What the images "
        "show, who made them and under which licence, and what the network must not be used for, only those who know "
        "the data can add here."
    )


def _repeat(trained: Trained) -> str:
    environment: dict[str, Any] = trained.environment()
    versions = environment.get("versions") or {}
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    parts = [
        "Save the recipe below as recipe.yaml, and with the same data:",
        "    hvd-lb train --recipe recipe.yaml --output again",
    ]
    if command := environment.get("command"):
        words = shlex.join(["hvd-lb", *map(str, command[1:])])
        parts.append(f"As it was typed: `{printable(words)}`.")
    if with_what:
        parts.append(
            f"It was made with {with_what}, by {count(environment.get('processes') or 1, 'process')}."
        )
    return "\n\n".join([*parts, f"```yaml\n{trained.recipe.to_yaml()}```"])
