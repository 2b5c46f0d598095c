"""From what a user typed to a recipe: which data, which preset and why, every field filled in."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hvd_lb.advice import advice
from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.decoding.decode import refuse_large
from hvd_lb.data.images import Dataset
from hvd_lb.data.loading.shared_pixels import check_cache
from hvd_lb.data.spec import absolute_spec, data_spec, is_named
from hvd_lb.errors import UserError
from hvd_lb.machine.cpu import describe_cpu, is_slow_in
from hvd_lb.machine.packages import untried
from hvd_lb.machine.placement import Placement
from hvd_lb.networks import check_input, check_model_name
from hvd_lb.plan.classes import class_weights, drawn_of_classes
from hvd_lb.plan.run_plan import RunPlan, Scale
from hvd_lb.plan.samples import SamplePlan
from hvd_lb.recipe import OPTIONS, Recipe, check_fields, load_values, merged_recipe, preset_names
from hvd_lb.recipe_file import read_named
from hvd_lb.schedule import Schedule

_IMAGENET_CLASSES, _IMAGENET_IMAGES = 1000, 1_000_000
_SMALL_SIDE = 64
# What data choose, where no recipe is named.
_CHOSEN = ("digits", "fashion-mnist", "goyal-resnet50", "images", "small-images")
# Fields that only some values of another one read.
_READ_WITH = {
    "reference_batch": ("lr_rule", ("linear", "sqrt")),
    "warmup_epochs": ("warmup", ("gradual", "constant")),
    "drop_epochs": ("schedule", ("step",)),
    "drop_factor": ("schedule", ("step",)),
    "power": ("schedule", ("polynomial",)),
    "trust_coefficient": ("optimizer", ("lars",)),
    **dict.fromkeys(("nesterov", "momentum_form", "momentum_correction"), ("optimizer", ("sgd", "lars"))),
    **dict.fromkeys(("beta2", "epsilon"), ("optimizer", ("lamb",))),
    "randaugment_operations": ("auto_augment", ("randaugment",)),
    "randaugment_strength": ("auto_augment", ("randaugment",)),
    "max_bad_images": ("on_bad_image", ("skip",)),
    "max_rollbacks": ("on_nan", ("rollback",)),
}


@dataclass(frozen=True)
class Resolved:
    """A run that has been checked and can start, or be explained."""

    recipe: Recipe
    dataset: Dataset
    preset: str
    why: str
    plan: SamplePlan
    schedule: Schedule
    chosen: frozenset[str] = frozenset()  #: the fields that options, or a recipe asked for, name
    new_head: tuple[str, ...] = ()  #: tensors that do not come from the weights it begins with
    scales: tuple[Scale, ...] = ()  #: of a run whose k has changed, or changes where it goes on

    @cached_property
    def run_plan(self) -> RunPlan:
        return self.recipe.run_plan(len(self.dataset.train), self.dataset.train.labels, self.scales)

    @property
    def total_steps(self) -> int:
        return min(self.run_plan.end, self.recipe.steps or self.run_plan.end)

    @property
    def stops_early(self) -> bool:
        """Whether --steps ends the run before its epochs do."""
        return self.total_steps < self.run_plan.end


def resolve(
    options: Mapping[str, Any],
    *,
    recipe: str | None,
    default_gpus: int,
    fallback_data: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Resolved:
    """Merge preset < recipe file < `options` (fields the user set), open the data and check everything.

    `fallback_data` is used where neither options nor recipe name data (`simulate`: synthetic); without it
    $HVD_LB_DATA or /data is. UserError for what cannot work.
    """
    given = check_options(options, recipe)
    chosen = frozenset({**given, **options})
    spec = data_spec(options, given, fallback_data)
    val = options.get("val", given.get("val"))
    val_fraction = options.get("val_fraction", given.get("val_fraction"))
    on_bad_image = options.get("on_bad_image", given.get("on_bad_image", "fail"))
    try:
        dataset = open_dataset(
            spec, val=val, val_fraction=val_fraction, on_progress=on_progress, on_bad_image=on_bad_image
        )
    except UserError as error:
        if options.get("data") or given.get("data") or spec != os.environ.get("HVD_LB_DATA"):
            raise
        raise UserError(f"HVD_LB_DATA: {error}") from None
    if recipe is not None:
        preset, why = recipe, "as asked for"
        if recipe in preset_names() and os.path.exists(recipe):
            why = f"the preset; what lies here by that name would be --recipe ./{recipe}"
    else:
        preset, why = choose_preset(spec, dataset)
        given = load_values(preset)
    here = {"gpus": default_gpus, "num_classes": len(dataset.train.classes)}
    places: dict[str, Any] = {"data": absolute_spec(spec)} | (
        {"val": absolute_spec(val)} if val is not None else {}
    )
    weights = options.get("class_weights", given.get("class_weights"))
    if isinstance(weights, str):
        places["class_weights"] = numbers_of_classes(weights, dataset.train.classes)
    if begins := options.get("init_from", given.get("init_from")):
        places["init_from"] = str(Path(begins).expanduser().absolute())
    resolved = _merged(given, preset, {**options, **places}, here)
    plan, schedule = check_with_data(resolved, dataset)
    head = begins_anew(resolved, dataset) if resolved.init_from else ()
    return Resolved(resolved, dataset, preset, why, plan, schedule, chosen, head)


def check_with_data(recipe: Recipe, dataset: Dataset) -> tuple[SamplePlan, Schedule]:
    """What an epoch has, and the learning rate of each step; UserError where these data cannot be trained on so."""
    classes = dataset.train.classes
    if (recipe.num_classes or len(classes)) < len(classes):
        raise UserError(
            f"--num-classes {recipe.num_classes}, but {dataset.name} has {len(classes)} classes: "
            "expected at least as many"
        )
    if len(classes) == 1:
        raise UserError(
            f"{dataset.name} has one class only ({classes[0]}), so there is nothing to tell apart: "
            "expected at least two"
        )
    weights = recipe.class_weights
    if isinstance(weights, str):
        numbers_of_classes(weights, classes)
    elif weights is not None and len(weights) != len(classes):
        raise UserError(
            f"class_weights has {len(weights)} numbers, but {dataset.name} has {len(classes)} classes: "
            "expected one for each, in their order"
        )
    elif weights is not None:
        class_weights(weights, drawn_of_classes(dataset.train.labels, len(classes), recipe.sampling))
    if recipe.on_bad_image == "fail":
        for split in (dataset.train, dataset.val):
            refuse_large(split, recipe.max_pixels)
    check_cache(recipe.cache, dataset)
    plan = recipe.sample_plan(len(dataset.train), dataset.train.labels)
    check_model_name(recipe.model)
    _check_recompute_bn(recipe, plan)
    for size in recipe.all_sizes:
        # One image alone in a short last step can be trained on (`allow_single_values`), but not always one.
        check_input(recipe.model, recipe.num_classes or len(classes), size, min(2, recipe.per_gpu_batch))
    return plan, recipe.lr_schedule(plan.steps_per_epoch)


def begins_anew(recipe: Recipe, dataset: Dataset) -> tuple[str, ...]:
    """The tensors that do not come from `init_from`; UserError where that is not of this network. Reads the file."""
    from hvd_lb.training.models import new_head  # here: needs torch, which --help does not

    return tuple(new_head(recipe, dataset.train.classes))


def numbers_of_classes(given: str, classes: Sequence[str]) -> str | tuple[float, ...]:
    """What --class-weights stands for: balanced, or the numbers in a file."""
    return given if given == "balanced" else read_class_weights(Path(given).expanduser(), classes)


def read_class_weights(path: Path, classes: Sequence[str]) -> tuple[float, ...]:
    """The numbers in a file with a line NAME WEIGHT for each class, in the order of `classes`; UserError."""
    found: dict[str, float] = {}
    try:
        text = read_named(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"--class-weights {path}: cannot be read ({why}): expected balanced or a file"
        ) from None
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line:
            continue
        try:
            name, weight = line.rsplit(maxsplit=1)
            own = float(weight)
            if not 0 <= own < math.inf:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--class-weights {path}, line {number}: expected NAME WEIGHT, a number of at least 0, found {line!r}"
            ) from None
        if name in found:
            raise UserError(f"--class-weights {path}, line {number}: {name!r} has a line before this one")
        found[name] = own
    wrong = sorted(found.keys() ^ set(classes))
    if wrong:
        what = "is no class of the data" if wrong[0] in found else "has no line"
        raise UserError(
            f"--class-weights {path}: {wrong[0]!r} {what}: expected a line NAME WEIGHT for each class"
        )
    return tuple(found[name] for name in classes)


def check_options(options: Mapping[str, Any], recipe: str | None) -> Mapping[str, Any]:
    """The values of the recipe that was named; UserError for what no data set could make right."""
    check_fields(options, OPTIONS)
    given = load_values(recipe) if recipe is not None else {}
    if recipe is not None:
        _merged(given, recipe, options)
    else:
        _check_with_presets(options)
    if "model" in {**given, **options}:
        check_model_name({**given, **options}["model"])
    return given


def _check_with_presets(options: Mapping[str, Any]) -> None:
    """UserError for options that no preset goes with: which one it will be, the data decide."""
    errors = []
    for preset in _CHOSEN:
        try:
            _merged(load_values(preset), preset, options)
        except UserError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def _merged(
    given: Mapping[str, Any], source: str, options: Mapping[str, Any], here: Mapping[str, Any] | None = None
) -> Recipe:
    """What recipe and options make together; UserError for an option that would change nothing."""
    recipe = merged_recipe({"this machine": here or {}, source: given, OPTIONS: options})
    refuse_unread(recipe, options)
    return recipe


def refuse_unread(recipe: Recipe, names: Iterable[str]) -> None:
    """UserError for the first of these fields that would change nothing."""
    for name in names:
        other, values = _READ_WITH.get(name, ("", ()))
        if other and getattr(recipe, other) not in values:
            option = other.replace("_", "-")
            raise UserError(
                f"--{name.replace('_', '-')} has no effect with {option} {getattr(recipe, other)}: leave it out, or "
                f"give --{option} {' or '.join(values)}"
            )


def choose_preset(spec: str, dataset: Dataset) -> tuple[str, str]:
    """The preset that fits a data set, and why."""
    if spec in ("digits", "fashion-mnist"):
        return spec, f"made for {spec}"
    if is_named(spec):
        return "goyal-resnet50", "synthetic images stand for ImageNet's"
    classes, images = len(dataset.train.classes), len(dataset.train)
    if classes == _IMAGENET_CLASSES and images >= _IMAGENET_IMAGES:
        return "goyal-resnet50", f"{classes:,} classes and {images:,} images, like ImageNet"
    sample = slice(0, 10_000)
    side = int(np.median(np.minimum(dataset.train.widths[sample], dataset.train.heights[sample])))
    if side <= _SMALL_SIDE:
        return "small-images", f"images of about {side} pixels"
    return "images", f"images of about {side} pixels, {classes:,} classes and {images:,} images: not ImageNet"


def _check_recompute_bn(recipe: Recipe, plan: SamplePlan) -> None:
    if recipe.recompute_bn is None:
        return
    from hvd_lb.training.models import has_batch_norm  # as above

    if not has_batch_norm(recipe.model):
        raise UserError(
            f"--recompute-bn {recipe.recompute_bn}, but {recipe.model} has no batch norm whose statistics could be "
            "recomputed: leave the option out"
        )
    if recipe.recompute_bn > plan.images:
        raise UserError(
            f"--recompute-bn {recipe.recompute_bn}, but the data set has {plan.images} training images: "
            "expected at most as many"
        )


def _sizes(recipe: Recipe) -> str:
    size, evaluation = (f"{side}×{side}" for side in (recipe.image_size, recipe.evaluation_size))
    return size if size == evaluation else f"{size} ({evaluation} in evaluations)"


def refuse_graphs(recipe: Recipe, device: str) -> None:
    """UserError where CUDA graphs are asked for, and `device` is a CPU."""
    if recipe.cuda_graphs == "on" and device == "cpu":
        raise UserError("--cuda-graphs on, but this run is on CPUs: leave it out, or give --device cuda")


def explain(resolved: Resolved, placement: Placement) -> list[tuple[str, str]]:
    """What a run will do there, as (topic, sentence) for a person."""
    recipe, plan, device = resolved.recipe, resolved.plan, placement.device
    dropped = plan.dropped_per_epoch
    rest = (
        f"{dropped:,} of {plan.images:,} images skipped by the last partial step"
        if dropped
        else "no image skipped"
    )
    epochs = f"{recipe.epochs} epoch" + ("s" if recipe.epochs != 1 else "")
    length = f"{resolved.total_steps:,} steps" + (f" (--steps) of {epochs}" if resolved.stops_early else "")
    rows = [
        ("recipe", f"{resolved.preset} ({resolved.why})"),
        (
            "data",
            f"{recipe.data}: {plan.images:,} training and {len(resolved.dataset.val):,} validation images, "
            f"{len(resolved.dataset.train.classes):,} classes",
        ),
        *_shadowed(recipe.data or ""),
        *(("note", note) for note in resolved.dataset.notes),
        ("model", f"{recipe.model}, {_sizes(recipe)}, {recipe.precision}"),
        (
            "minibatch",
            f"{recipe.gpus} virtual workers × {recipe.per_gpu_batch} = {recipe.global_batch:,} images",
        ),
        ("epoch", f"{plan.steps_per_epoch:,} steps, {rest}"),
        ("length", f"{epochs}, {length}" if not resolved.stops_early else length),
        ("learning rate", resolved.schedule.describe()),
    ]
    if recipe.init_from:
        head = f", but for a new last layer ({', '.join(resolved.new_head)})" if resolved.new_head else ""
        rows.append(("begins with", f"the weights of {recipe.init_from}{head}"))
    if recipe.freeze != "none":
        rows.append(("frozen", "all but the last layer"))
    if recipe.shuffle == "per-worker":
        rows.append(
            ("shuffling", "each worker keeps a share of the images and shuffles that, as an ablation")
        )
    if recipe.progressive_size:
        sides = ", ".join(map(str, (*recipe.progressive_size, recipe.image_size)))
        rows.append(
            (
                "image sizes",
                f"{sides} pixels, for as many epochs each; rehearsals and forecasts take the last",
            )
        )
    rows += _sampling(recipe, plan)
    if recipe.class_weights is not None:
        how = "inverse to their images" if recipe.class_weights == "balanced" else "as given, scaled"
        rows.append(("class weights", f"{how}, so that their mean over the images is 1"))
    if recipe.ema:
        a_step = recipe.ema ** (recipe.global_batch / 256)
        rows.append(
            ("averaged weights", f"decay {recipe.ema:g} at each 256 images, {a_step:.6g} a step after warmup")
        )
    if recipe.together not in ("auto", 1):
        rows.append(("together", f"up to {recipe.together} virtual workers of a process as one batch"))
    if recipe.compress != "none":
        rows.append(("gradients", f"between processes in {recipe.compress}, and added up in it"))
    if recipe.reproducible:
        threads = f"{recipe.threads} thread" + ("s" if recipe.threads != 1 else "")
        rows.append(("reproducible", f"bitwise the same on any number of processes of {threads} each"))
    if device == "cuda" and recipe.precision == "fp32" and "precision" not in resolved.chosen:
        layout = "" if recipe.channels_last else " --channels-last"
        rows.append(
            (
                "note",
                f"fp32 leaves a GPU's tensor cores idle: --precision bf16{layout} uses them, with other rounding "
                "(ResNet-50 on an H200, 32 images at a time: 3.8 times as fast)",
            )
        )
    if device == "cpu" and is_slow_in(recipe.precision, placement.first_host or describe_cpu()):
        rows.append(
            (
                "note",
                f"torch has only slow kernels for {recipe.precision} on this CPU, whose instruction sets lack it: "
                "--precision fp32 is several times as fast (ResNet-18, 224×224, on a CPU with AVX2: 12 times in bf16)",
            )
        )
    lines = advice(recipe, resolved.preset, steps_per_epoch=plan.steps_per_epoch, images=plan.images)
    rows += [("advice", line) for line in lines]
    if newer := untried():
        compare = "hvd-lb doctor --selftest compares it with what it should compute"
        rows.append(("warning", f"{' and '.join(newer)}: newer than hvd-lb was tried with; {compare}"))
    if recipe.recompute_bn:
        rows.append(("batch norm", f"statistics from {recipe.recompute_bn:,} images before each evaluation"))
    return rows


def _sampling(recipe: Recipe, plan: SamplePlan) -> list[tuple[str, str]]:
    """What an epoch has in place of each image once."""
    rows = []
    if balanced := plan.balanced:
        least, most = (int(end) for end in (balanced.sizes.min(), balanced.sizes.max()))
        each = plan.images / len(balanced.classes)
        rows.append(
            (
                "sampling",
                f"each of {len(balanced.classes):,} classes {each:,.4g} times an epoch: an image of the smallest "
                f"({least:,}) {each / least:.3g} times, one of the largest ({most:,}) {each / most:.3g} times",
            )
        )
    if plan.repeats > 1:
        rows.append(
            (
                "repeated",
                f"each image {plan.repeats} times in its minibatch, {plan.distinct_per_epoch:,} of {plan.images:,} "
                "images in an epoch",
            )
        )
    return rows


def _shadowed(data: str) -> list[tuple[str, str]]:
    """Which one is taken where a built-in data set and something in the working directory have one name."""
    if not (is_named(data) and os.path.exists(data)):
        return []
    return [("", f"the built-in data set; what lies here by that name would be --data ./{data}")]
