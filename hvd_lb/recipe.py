"""Every number that fixes a run, in one validated model; YAML in and out; presets in recipes/*.yaml.

A field is documented once, here: the command line's options and their help are made from these fields. Hardware
(processes, device, hosts, output folder) is not part of a recipe: it may change on the way without changing the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hvd_lb.data.options import MAX_PIXELS, MOST_PIXELS, CacheKind, LoaderKind, OnBadImage
from hvd_lb.errors import UserError, nearest, renamed, short_numbers
from hvd_lb.plan.samples import LastBatch, SamplePlan
from hvd_lb.plan.sizes import ImageSizes
from hvd_lb.recipe_file import dump_values, parse_values, read_text
from hvd_lb.schedule import (
    REFERENCE_BATCH,
    REFERENCE_EPOCHS,
    Change,
    RescaledSchedule,
    Rule,
    Schedule,
    Shape,
    Warmup,
    ramp_steps,
    scaled_learning_rate,
)

if TYPE_CHECKING:
    import numpy as np

    from hvd_lb.plan.augment import CentreWindows, RandomWindows
    from hvd_lb.plan.run_plan import RunPlan, Scale

Precision = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]


def _check_together(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value <= _MOST_GPUS):
        raise ValueError(f"expected auto or a number of virtual workers from 1 to {_MOST_GPUS:,}")
    return value


OnNan = Literal["stop", "rollback"]
Compress = Literal["none", "fp16", "bf16"]
OptimizerKind = Literal["sgd", "lars", "lamb"]
Shuffle = Literal["global", "per-worker"]
Sampling = Literal["uniform", "balanced"]
AutoAugmentKind = Literal["none", "randaugment", "trivialaugment"]

# The source of fields that were given on the command line.
OPTIONS = "options"

# YAML takes these words for true and false.
_SWITCH = {True: "on", False: "off"}

# Fields that have no default of their own: one virtual worker per GPU, the classes of the data.
LEFT_TO_THE_MACHINE = {"gpus", "num_classes"}

# More than any run has; products of two of them are numbers of 64 bits.
_MOST = 2**31 - 1
_MOST_THREADS = 4096
# What fp32 computes with: 10^±38, and room for a factor.
_TINY, _HUGE = 1e-30, 1e30
_MOST_GPUS = 2**20
# The options that give what schedule and plan have by other names.
_OPTIONS_OF_SCHEDULE = {"warmup_epochs": "--warmup-epochs", "epochs": "--epochs"}
_OPTIONS_OF_PLAN = {
    "workers": "GPUs",
    "worker": "GPU",
    "last_batch": "--last-batch",
    "repeats": "--repeated-augment",
}
_MOST_CLASSES = 10_000_000

_EVERY = re.compile(r"(\d{1,9}) ?(steps?|epochs?)")
_EVERY_MINUTES = re.compile(r"(\d{1,9}) ?(?:min|minutes?)")

# What pydantic says in its own words.
_EXPECTED = {
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text; what could be something else goes in quotes",
}


def _check_every(text: str) -> str:
    if text != "never" and not ((match := _EVERY.fullmatch(text)) and int(match[1])):
        raise ValueError("expected a period such as 500steps, 1epoch or never")
    return text


def _check_every_or_minutes(text: str) -> str:
    if not ((match := _EVERY_MINUTES.fullmatch(text)) and int(match[1])):
        try:
            _check_every(text)
        except ValueError:
            raise ValueError("expected a period such as 500steps, 10min, 1epoch or never") from None
    return text


def _check_class_weights(value: Any) -> Any:
    """Before pydantic looks at it, which says of what is neither text nor numbers only that it is no text."""
    weights = tuple(value) if isinstance(value, list) else value
    if isinstance(weights, tuple):
        numbers = all(isinstance(of, int | float) and 0 <= of < math.inf for of in weights)
        if not (numbers and any(weights)):
            raise ValueError("expected weights of at least 0, not all of them 0")
    elif not (weights is None or isinstance(weights, str)):
        raise ValueError("expected balanced, a file or a list of numbers")
    return weights


def _listed(length: int | None = None) -> BeforeValidator:
    """A YAML list as a tuple, of this length."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) != (length or len(value)):
            raise ValueError(f"expected {length} numbers" if length else "expected a list of numbers")
        return tuple(value)

    return BeforeValidator(check)


def _range(most: float) -> AfterValidator:
    def check(pair: tuple[float, float]) -> tuple[float, float]:
        if not 0 < pair[0] <= pair[1] <= most:
            raise ValueError(f"expected two increasing numbers above 0, at most {most:g}")
        return pair

    return AfterValidator(check)


def _each(least: float, most: float, *, increasing: bool = False, what: str = "numbers") -> AfterValidator:
    def check(numbers: tuple[float, ...]) -> tuple[float, ...]:
        if not all(least <= number <= most for number in numbers) or (
            increasing and list(numbers) != sorted(numbers)
        ):
            raise ValueError(f"expected {what} from {least:g} to {most:g}")
        return numbers

    return AfterValidator(check)


Every = Annotated[str, AfterValidator(_check_every)]
EveryOrMinutes = Annotated[str, AfterValidator(_check_every_or_minutes)]
Colour = Annotated[tuple[float, float, float], _listed(3)]
CropScale = Annotated[tuple[float, float], _listed(2), _range(1)]
CropRatio = Annotated[tuple[float, float], _listed(2), _range(1000)]
Noise = Annotated[Literal["on", "off"], BeforeValidator(lambda value: _SWITCH.get(value, value))]
CudaGraphs = Annotated[Literal["auto", "on", "off"], BeforeValidator(lambda value: _SWITCH.get(value, value))]
Together = Annotated[int | Literal["auto"], BeforeValidator(_check_together)]
Sizes = Annotated[
    tuple[int, ...], _listed(), _each(1, 8192, increasing=True, what="increasing whole numbers")
]
# A file's become numbers, in the order of the classes, when a run is resolved.
ClassWeights = Annotated[str | tuple[float, ...] | None, BeforeValidator(_check_class_weights)]
Epochs = Annotated[
    tuple[float, ...],
    _listed(),
    _each(0, REFERENCE_EPOCHS, increasing=True, what=f"increasing epochs of a run of {REFERENCE_EPOCHS},"),
]


def period_in_seconds(every: str) -> float:
    """A period of minutes ("10min") in seconds; infinite for one of steps and for never."""
    match = _EVERY_MINUTES.fullmatch(every)
    return 60.0 * int(match[1]) if match else math.inf


def period_in_steps(every: str, steps_per_epoch: int) -> int:
    """A period ("500steps", "2epochs", "never") as a number of steps; 0 for never and for one of minutes."""
    match = _EVERY.fullmatch(every)
    if not match:
        return 0
    return int(match[1]) * (steps_per_epoch if match[2].startswith("epoch") else 1)


def _free(default: Any, description: str, **limits: Any) -> Any:
    """A field that does not touch the mathematics: a run may be resumed with another value."""
    return Field(default, description=description, json_schema_extra={"free": True}, **limits)


class Recipe(BaseModel):
    """One run. Units: epochs and steps count from 0, learning rates are for a minibatch of `reference_batch` images."""

    # strict: true is not 1, 8.0 not 8 and "8" no number. Built at first use: --help, which only lists the fields, need
    # not wait for it.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    description: str = _free("", "What this recipe is for.")

    # data
    data: str | None = _free(
        None,
        "digits, fashion-mnist, synthetic[:N], a folder, list or shards, these also at s3://, gs:// or https://: "
        "docs/data.md [default: $HVD_LB_DATA or /data]",
    )
    val: str | None = _free(
        None, "Validation images where they are not beside the training images: folder, list or shards."
    )
    val_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share held out where there is no val/ folder."
    )
    loader: LoaderKind = Field("dali", description="What decodes and resizes the images.")
    image_size: int = Field(224, ge=1, le=8192, description="Side of the square the network sees, in pixels.")
    progressive_size: Sizes = Field(
        (),
        description="Smaller sides that training begins with, in pixels, for as many epochs each as --image-size.",
    )
    crop_scale: CropScale = Field((0.08, 1.0), description="Random crop: share of the image's area.")
    crop_ratio: CropRatio = Field((3 / 4, 4 / 3), description="Random crop: aspect ratio, width/height.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    auto_augment: AutoAugmentKind = Field(
        "none", description="Operations drawn for each crop: randaugment, or trivialaugment (wide)."
    )
    randaugment_operations: int = Field(2, ge=1, le=16, description="RandAugment: operations on each crop.")
    randaugment_strength: int = Field(9, ge=0, le=30, description="RandAugment: their strength.")
    random_erasing: float = Field(
        0.0, ge=0, le=1, description="Probability that a rectangle of a crop becomes the mean colour."
    )
    eval_size: int | None = Field(
        None, ge=1, le=8192, description="Evaluation: side of that square [default: as --image-size]"
    )
    eval_crop: float = Field(
        0.875, gt=0, le=1, description="Evaluation: side of the centre crop / shorter side."
    )
    mean: Annotated[Colour, _each(0, 1)] = Field(
        (0.485, 0.456, 0.406), description="Mean of the colours, 0 to 1."
    )
    std: Annotated[Colour, _each(1e-6, 1)] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation of the colours."
    )
    antialias: bool = Field(True, description="Smooth before shrinking images.")
    # Free: a run that goes on with `skip` has met no bad image before.
    on_bad_image: OnBadImage = _free(
        "fail", "An image that cannot be decoded ends the run, or another one stands in (docs/data.md)."
    )
    max_bad_images: float = _free(
        0.01, "With skip: more than this share of the images in an epoch ends the run.", ge=0, le=1
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, le=MOST_PIXELS, description="An image of more pixels is not decoded, and so bad."
    )

    # minibatch
    gpus: int = Field(
        1, ge=1, le=_MOST_GPUS, description="Virtual workers k; the minibatch is k × per-gpu-batch."
    )
    per_gpu_batch: int = Field(32, ge=1, le=_MOST, description="Images of one virtual worker in a step, n.")
    last_batch: LastBatch = Field(
        "drop", description="What becomes of the rest of an epoch that fills no step."
    )
    shuffle: Shuffle = Field(
        "global",
        description="One order of all images per epoch, divided among the workers; or, an ablation, each worker keeps "
        "a share and shuffles that.",
    )
    sampling: Sampling = Field(
        "uniform", description="Which images an epoch has: each once, or (balanced) as many of each class."
    )
    repeated_augment: int = Field(
        1,
        ge=1,
        le=1024,
        description="Times that a minibatch has each of its images, with other augmentations.",
    )
    epochs: int = Field(
        90, ge=1, le=_MOST, description="Length of the run; the learning rate schedule fits itself to it."
    )
    steps: int | None = _free(
        None, "Stop after this many steps; the schedule stays that of --epochs.", ge=1, le=_MOST
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="Fixes initialisation, order and augmentation.")

    # model
    model: str = Field(
        "resnet50", description="Any torchvision classification model, or resnet8/14/20/32/44/56/110."
    )
    num_classes: int | None = Field(
        None, ge=1, le=_MOST_CLASSES, description="Outputs of the network [default: the data set's classes]"
    )
    zero_gamma: bool = Field(
        True, description="Last batch norm of a residual block starts at 0 (section 5.1)."
    )
    bn_momentum: float = Field(0.1, gt=0, le=1, description="Weight of one step in the running statistics.")
    mixup: float = Field(
        0.0, ge=0, le=4, description="Mixup within each microbatch: α of the shares' distribution; 0 is none."
    )
    cutmix: float = Field(
        0.0, ge=0, le=4, description="CutMix likewise; with both, each microbatch gets one of them."
    )
    init_from: str | None = _free(
        None,
        "Begin with these weights, of a run, a checkpoint or a .safetensors file; of other classes: with a new last "
        "layer.",
    )
    freeze: Literal["none", "backbone"] = Field(
        "none", description="What does not learn: with backbone all but the last layer."
    )
    class_weights: ClassWeights = Field(
        None,
        description="Weights of classes in the training loss: balanced (rare ones count more), or a file with a line "
        "NAME WEIGHT for each; of mean 1 over the images.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the training loss.")
    precision: Precision = Field(
        "fp32",
        description="Arithmetic: tf32 is fp32 with products of 11 bits on GPUs; bf16 and fp16 are autocast.",
    )

    # learning rate
    learning_rate: float = Field(
        0.1, ge=_TINY, le=_HUGE, description="Reference learning rate, for `reference_batch` images."
    )
    reference_batch: int = Field(
        REFERENCE_BATCH,
        ge=1,
        le=_MOST,
        description="Images of the minibatch that the reference learning rate is for.",
    )
    lr_rule: Rule = Field("linear", description="How the learning rate grows with the minibatch.")
    schedule: Shape = Field("step", description="How it falls after warmup.")
    warmup: Warmup = Field(
        "gradual", description="From the reference to the scaled rate, where that is higher."
    )
    warmup_epochs: float = Field(5, ge=0, description="Length of warmup.")
    drop_epochs: Epochs = Field((30.0, 60.0, 80.0), description="Step decay, in epochs of a run of 90.")
    drop_factor: float = Field(0.1, gt=0, le=1, description="Step decay: factor at each drop.")
    power: float = Field(2.0, gt=0, description="Exponent of the polynomial decay.")

    # optimizer
    optimizer: OptimizerKind = Field(
        "sgd",
        description="sgd, or lars (the same) and lamb (Adam), in which each tensor scales the rate by a trust ratio.",
    )
    trust_coefficient: float = Field(
        0.001, ge=_TINY, le=_HUGE, description="LARS: factor of the trust ratios."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum m; of LAMB β₁.")
    beta2: float = Field(0.999, ge=0, lt=1, description="LAMB: β₂, of the squared gradients' average.")
    epsilon: float = Field(
        1e-6, ge=_TINY, le=_HUGE, description="LAMB: ε, added to the square root of that average."
    )
    nesterov: bool = Field(True, description="Nesterov momentum.")
    momentum_form: Literal[9, 10] = Field(10, description="Momentum as in equation 9 or 10 of the paper.")
    momentum_correction: bool = Field(
        True, description="Form 10: rescale the velocity when the rate changes."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep an average of the weights, too: its decay at each 256 images, such as 0.9999.",
    )
    clip_norm: float | None = Field(
        None,
        ge=_TINY,
        le=_HUGE,
        description="Longest gradient of a step, in its L2 norm; longer ones are scaled down.",
    )
    weight_decay: float = Field(
        1e-4, ge=0, le=_HUGE, description="L2 penalty λ; none on batch norm's γ and β."
    )

    compress: Compress = Field(
        "none",
        description="Exchange gradients between processes in half precision, fp16 or bf16 (--engine torch): half the "
        "bytes, with a rounding of its own.",
    )

    # exactness
    reproducible: bool = Field(
        False, description="Bitwise the same run on any number of processes (docs/exactness.md)."
    )
    audit: float = _free(
        0.0,
        "With --reproducible: so many virtual workers a step, at most 1, are computed by a second process, too, which "
        "finds processes that compute wrongly.",
        ge=0,
        le=1,
    )
    recompute_bn: int | None = Field(
        None,
        ge=1,
        le=_MOST,
        description="Before evaluations take batch norm's statistics anew from so many images.",
    )

    # how it is run: none of these touches the mathematics, but see `mathematics`
    threads: int | None = _free(
        None,
        "CPU threads of each process [default: cores / processes; 1 with --reproducible]",
        ge=1,
        le=_MOST_THREADS,
    )
    loader_threads: int | None = _free(
        None,
        "CPU threads of each process that decode and resize images [default: as --threads; cores / processes with "
        "--reproducible]",
        ge=1,
        le=_MOST_THREADS,
    )
    read_threads: int | None = _free(
        None,
        "Threads of each process that read images [default: as many as help, at most 64]",
        ge=1,
        le=_MOST_THREADS,
    )
    prefetch: int = _free(2, "Microbatches kept ready for the network.", ge=1, le=1024)
    cache: CacheKind = _free(
        "none", "Decode small data once for all processes of a host: memory, or disk to keep it between runs."
    )
    together: Together = _free(
        "auto",
        "Virtual workers of a process that are computed as one batch: as many as are fastest, found out in the first "
        "steps (with --reproducible, --compile or fp16: 1), or so many.",
    )
    channels_last: bool = _free(False, "Keep images and weights in channels-last memory order.")
    compile: bool = _free(False, "Compile the model with torch.compile.")
    cuda_graphs: CudaGraphs = _free(
        "auto",
        "Launch forward and backward as CUDA graphs: on, off, or, on GPUs, where that is faster.",
    )
    eval_every: Every = _free("1epoch", "Period of evaluation: 500steps, 1epoch, never. Always at the end.")
    log_every: int | None = _free(
        None, "Steps between metrics [default: 20 times an epoch, at most every 10]", ge=1, le=_MOST
    )
    checkpoint_every: EveryOrMinutes = _free(
        "1epoch", "Period of checkpoints: 500steps, 10min, 1epoch, never. Always at the end."
    )
    keep_checkpoints: int = _free(3, "Newest checkpoints kept, besides the best.", ge=1, le=_MOST)
    digest_every: Every = _free(
        "1epoch",
        "Period of digests of weights and velocities, chained with all records, that `hvd-lb verify` holds a run to: "
        "500steps, 1epoch, never. Also at the end.",
    )
    on_nan: OnNan = _free(
        "stop",
        "Loss or weights that are no numbers: end, or go back to a checkpoint and leave that minibatch out.",
    )
    noise_scale: Noise = _free(
        "on",
        "Estimate the gradient noise scale, the minibatch beyond which more images buy little: on or off.",
    )
    max_rollbacks: int = _free(
        3,
        "With rollback: after so many minibatches left out, or faults that did not come again, the run ends.",
        ge=1,
        le=_MOST,
    )

    @model_validator(mode="before")
    @classmethod
    def _threads_of_reproducible_runs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("reproducible") and values.get("threads") is None:
            return {**values, "threads": 1}
        return values

    @field_validator("data")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("expected the name of data")
        return value

    @field_validator("*")
    @classmethod
    def _without_negative_zero(cls, value: Any) -> Any:
        """-0.0 is 0: two spellings of a run are one run."""
        if isinstance(value, tuple):
            return tuple(number + 0.0 if isinstance(number, float) else number for number in value)
        return value + 0.0 if isinstance(value, float) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.momentum_form == 9 and not self.momentum_correction:
            raise _conflict(
                "form 9 needs no correction, so there is none to leave out: use form 10",
                "momentum_correction",
                "momentum_form",
            )
        if self.audit and not self.reproducible:
            raise _conflict(
                "audits compare bits, which are the same on all processes with --reproducible only: add it",
                "audit",
                "reproducible",
            )
        if self.compress != "none" and self.reproducible:
            raise _conflict(
                "the same bits need exact sums, which half precision does not hold: leave one of them out",
                "compress",
                "reproducible",
            )
        if self.cuda_graphs == "on" and self.compile:
            raise _conflict(
                "a compiled network launches its own way: leave one of them out", "cuda_graphs", "compile"
            )
        if self.sampling == "balanced" and self.class_weights == "balanced":
            raise _conflict(
                "either is enough: with both, rare classes would count more than others",
                "sampling",
                "class_weights",
            )
        peak = scaled_learning_rate(self.learning_rate, self.global_batch, self.lr_rule, self.reference_batch)
        if not _TINY <= peak <= _HUGE:
            raise _conflict(
                f"a minibatch of {self.global_batch:,} images has the rate {peak:g}: expected {_TINY:g} to {_HUGE:g}",
                "learning_rate",
                "reference_batch",
            )
        if self.progressive_size and self.progressive_size[-1] >= self.image_size:
            raise _conflict(
                "training ends with the latter: expected smaller ones before it",
                "progressive_size",
                "image_size",
            )
        if len(self.progressive_size) >= self.epochs:
            raise _conflict("each size has an epoch at least", "progressive_size", "epochs")
        if self.shuffle == "per-worker" and (self.sampling != "uniform" or self.repeated_augment > 1):
            raise _conflict(
                "shares that workers keep are an ablation of plain epochs, in which each image comes once",
                "shuffle",
                "sampling" if self.sampling != "uniform" else "repeated_augment",
            )
        if self.ema and self.recompute_bn:
            raise _conflict(
                "statistics are taken anew with the weights as they are, not with their average: leave one of them out",
                "ema",
                "recompute_bn",
            )
        if self.nesterov and not self.momentum and self.optimizer != "lamb":
            raise _conflict(
                "nesterov needs a momentum above 0: give --momentum 0.9 or --no-nesterov",
                "momentum",
                "nesterov",
            )
        return self

    @property
    def global_batch(self) -> int:
        """Images of a step, kn."""
        return self.gpus * self.per_gpu_batch

    @property
    def fixed_group(self) -> int:
        """How many consecutive virtual workers are always computed together, and so by one process: 1, if none are.

        In the reproducible mode that is part of the run, as sums round otherwise in another group.
        """
        return self.together if self.reproducible and self.together != "auto" else 1

    def lr_schedule(self, steps_per_epoch: int) -> Schedule:
        with renamed(_OPTIONS_OF_SCHEDULE):
            return Schedule(
                learning_rate=self.learning_rate,
                global_batch=self.global_batch,
                steps_per_epoch=steps_per_epoch,
                epochs=self.epochs,
                rule=self.lr_rule,
                shape=self.schedule,
                warmup=self.warmup,
                warmup_epochs=self.warmup_epochs,
                drop_epochs=self.drop_epochs,
                drop_factor=self.drop_factor,
                power=self.power,
                reference_batch=self.reference_batch,
            )

    def sample_plan(self, images: int, labels: np.ndarray | None = None) -> SamplePlan:
        """The plan on a data set of so many training images; UserError when the minibatch is larger than that.

        Which images come, with balanced sampling, only a plan with their `labels` tells.
        """
        from hvd_lb.plan.classes import Balanced  # needs numpy, which --help does not
        from hvd_lb.plan.counter import generator_seed
        from hvd_lb.plan.per_worker import PerWorkerPlan

        seed = generator_seed(self.seed, 2)
        balanced = Balanced(labels, seed) if self.sampling == "balanced" and labels is not None else None
        plan = PerWorkerPlan if self.shuffle == "per-worker" else SamplePlan
        with renamed(_OPTIONS_OF_PLAN):
            return plan(
                images,
                self.gpus,
                self.per_gpu_batch,
                seed,
                self.last_batch,
                self.repeated_augment,
                balanced,
            )

    def run_plan(
        self, images: int, labels: np.ndarray | None = None, scales: Sequence[Scale] = ()
    ) -> RunPlan:
        """All steps of a run on so many images, with these `scales`; UserError as `sample_plan`."""
        from hvd_lb.plan.run_plan import RunPlan  # as above

        plan = self.sample_plan(images, labels)
        with renamed(_OPTIONS_OF_PLAN):
            return RunPlan(plan, self.epochs, scales)

    def run_schedule(self, plan: RunPlan) -> Schedule | RescaledSchedule:
        """The learning rate of each step of it."""
        if len(plan.scales) == 1:
            return self.rescaled(plan.plan.workers).lr_schedule(plan.plan.steps_per_epoch)
        changes = []
        for part in plan.parts:
            steps_per_epoch = part.plan.steps_per_epoch
            schedule = self.rescaled(part.plan.workers).lr_schedule(steps_per_epoch)
            ramp = ramp_steps(self.momentum, steps_per_epoch)
            changes.append(Change(part.scale.step, schedule, part.virtual_step, ramp))
        return RescaledSchedule(changes)

    def rescaled(self, workers: int) -> Recipe:
        """The same with so many virtual workers."""
        return self if workers == self.gpus else self.model_copy(update={"gpus": workers})

    def image_sizes(self, steps_per_epoch: int, offset: int = 0) -> ImageSizes:
        """The sides of training images, by step."""
        return ImageSizes((*self.progressive_size, self.image_size), self.epochs, steps_per_epoch, offset)

    @property
    def all_sizes(self) -> set[int]:
        """Of images that the network sees, in training and evaluations."""
        return {*self.progressive_size, self.image_size, self.evaluation_size}

    def random_windows(self, size: int | None = None) -> RandomWindows:
        """Crop windows of training, and what is done to the crops, which are of this size, or `image_size`."""
        from hvd_lb.plan.augment import Augmentation, Erase, Flip, RandomWindows  # as above
        from hvd_lb.plan.auto_augment import RANDOM, TRIVIAL_WIDE, AutoAugment

        parts: list[Augmentation] = [Flip(self.flip)]
        if self.auto_augment == "randaugment":
            operations, strength = self.randaugment_operations, self.randaugment_strength
            parts.append(AutoAugment(RANDOM, operations, strength, self.mean, self.std))
        elif self.auto_augment == "trivialaugment":
            parts.append(AutoAugment(TRIVIAL_WIDE, 1, None, self.mean, self.std))
        if self.random_erasing:
            parts.append(Erase(self.random_erasing, size or self.image_size, self.mean))
        return RandomWindows(self.seed, self.crop_scale, self.crop_ratio, tuple(parts))

    @property
    def evaluation_size(self) -> int:
        """Side of the square the network sees in evaluations, and in use, in pixels."""
        return self.eval_size or self.image_size

    def centre_windows(self) -> CentreWindows:
        """Crop windows of evaluation."""
        from hvd_lb.plan.augment import CentreWindows  # as above

        return CentreWindows(self.eval_crop)

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of steps of a run: its epochs', or fewer where --steps ends it."""
        total = self.epochs * steps_per_epoch
        return min(total, self.steps or total)

    def mathematics(self) -> dict[str, Any]:
        """The fields a resumed run must share, as JSON values.

        In the reproducible mode the last bit counts, and so does what only rounds otherwise. Where batch norm's
        statistics are recomputed before evaluations, these belong to the run.
        """
        counting = _ROUNDING_FIELDS if self.reproducible else set()
        if self.fixed_group > 1:
            counting = counting | {"together"}
        if self.recompute_bn:
            counting = counting | {"eval_every"}
        return self.model_dump(mode="json", exclude=FREE_FIELDS - counting)

    def digest(self) -> str:
        """Eight hexadecimal digits that name the mathematics, the data and the weights it begins with.

        Fields that have their default are left out, so that those of later versions change no name.
        """
        chosen = self.model_dump(exclude_defaults=True).keys()
        mathematics = {name: value for name, value in self.mathematics().items() if name in chosen}
        begins = [self.init_from] if self.init_from else []
        text = json.dumps([self.data, mathematics, *begins], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def to_yaml(self, leave_out: set[str] | None = None) -> str:
        return dump_values(self.model_dump(mode="json", exclude=leave_out))


_ROUNDING_FIELDS = {"threads", "channels_last", "compile"}
#: What in float mode rounds otherwise, and may be other values when a run goes on.
FLOAT_FIELDS = {*_ROUNDING_FIELDS, "together"}
FREE_FIELDS = {
    name
    for name, field in Recipe.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free")
}


def _conflict(message: str, *fields: str) -> PydanticCustomError:
    """Fields that are right by themselves, and wrong together."""
    return PydanticCustomError("conflict", message, {"fields": fields})


def make_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A validated recipe; UserError in one line that names the field, what was given and what was expected."""
    return merged_recipe({source: values})


def merged_recipe(layers: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe that values from several sources (preset or file < `OPTIONS`) make together, later ones over earlier.

    Every value has to be one, and together they have to make sense. None leaves a field to earlier ones. UserError in
    one line that names the fields, what was given where, and what was expected.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in layers.items():
        check_fields(values, source)
        said = {name: value for name, value in values.items() if value is not None}
        merged |= said
        sources |= dict.fromkeys(said, source)
    try:
        return Recipe(**merged)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        fields = sorted(first["ctx"]["fields"], key=lambda name: name not in merged)
        said_of = (
            _said(name, merged[name], sources[name])
            if name in merged
            else f"{name} = {Recipe.model_fields[name].default!r} by default"
            for name in fields
        )
        raise UserError(f"{' with '.join(said_of)}: {first['msg']}") from None


def check_fields(values: Mapping[str, Any], source: str) -> None:
    """UserError for a name or a value that is wrong whatever the other fields are."""
    for name in values:
        if name not in Recipe.model_fields:
            raise UserError(f"{source}: unknown field {name!r}{nearest(str(name), Recipe.model_fields)}")
    try:
        Recipe(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"]:
            name = str(first["loc"][0])
            message = first["msg"].removeprefix("Value error, ")
            message = _EXPECTED.get(first["type"], message[0].lower() + message[1:])
            raise UserError(f"{_said(name, values[name], source)}: {short_numbers(message)}") from None


def _said(name: str, value: Any, source: str) -> str:
    """`--flip 2` or `mine.yaml: flip = 2`."""
    if source != OPTIONS:
        return f"{source}: {name} " + ("is empty" if value is None else f"= {_shortened(repr(value))}")
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    if isinstance(value, tuple):
        return f"--{option} {','.join(f'{number:g}' for number in value)}"
    return f"--{option} {_shortened(str(value))}"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def differing_fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Fields of two recipes' `mathematics` that differ, as "name: a → b".

    A field that one of them lacks is of a newer version: it has its default there, as the older version did.
    """

    def value(of: Mapping[str, Any], name: str) -> Any:
        return of[name] if name in of else _defaults().get(name, "absent")

    return [
        f"{name}: {value(a, name)} → {value(b, name)}"
        for name in sorted({*a, *b})
        if value(a, name) != value(b, name)
    ]


@cache
def _defaults() -> dict[str, Any]:
    """As JSON values."""
    return Recipe.model_validate({}).model_dump(mode="json")


def preset_names() -> list[str]:
    return sorted(file.name[:-5] for file in _presets().iterdir() if file.name.endswith(".yaml"))


def load_values(name_or_path: str) -> dict[str, Any]:
    """The fields a preset or a YAML file sets: each of them is right, though not yet together with others."""
    if name_or_path in preset_names():
        source, text = name_or_path, (_presets() / f"{name_or_path}.yaml").read_text("utf-8")
    else:
        path = Path(name_or_path).expanduser()
        if not os.path.exists(path):
            raise UserError(
                f"recipe {name_or_path!r} is neither a preset ({', '.join(preset_names())}) nor a YAML file"
                f"{nearest(name_or_path, preset_names())}"
            )
        source, text = str(path), read_text(path)
    values = parse_values(text, source)
    check_fields(values, source)
    return values


def _presets() -> Any:
    return resources.files("hvd_lb") / "recipes"
