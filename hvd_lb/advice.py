"""What a run's minibatch and schedule should make somebody think of, in sentences; nothing here ends a run."""

from __future__ import annotations

import math

from hvd_lb.optim.noise_scale import NoiseEstimate
from hvd_lb.recipe import Recipe

_FEW_STEPS = 10  # of an epoch: with fewer, schedules that go by epochs have no time for their parts
_SHORT_WARMUP = 30  # steps
_ABOVE_NOISE = 2.0
_LARGE_FOR_LAMB = 0.05  # of a tensor's length in each step; SGD's usual rates are above it
#: The largest minibatch for which a preset's errors are known to stay: the paper's table 1 and figure 1.
_TESTED = {
    "goyal-resnet50": (8192, "with 16,384 the paper's error grows from 23.7 to 24.8 %"),
    "goyal-resnet101": (8192, "the paper has nothing beyond it"),
    "torchvision-resnet50": (1024, "nothing beyond it was published"),
    "lars-resnet50": (32768, "nothing beyond it was looked up"),
}


def advice(
    recipe: Recipe, preset: str, *, steps_per_epoch: int, images: int, noise: NoiseEstimate | None = None
) -> list[str]:
    """Warnings, each with what to do instead; empty when there is nothing to say."""
    found = []
    batch = recipe.global_batch
    if preset in _TESTED and batch > (most := _TESTED[preset][0]):
        found.append(
            f"a minibatch of {batch:,} images is beyond what {preset} was tested with: {_TESTED[preset][1]}; "
            f"{_instead(recipe, most)}"
        )
    if noise and noise.value and noise.high and batch > _ABOVE_NOISE * noise.high:
        found.append(
            f"a minibatch of {batch:,} images is far above the gradient noise scale ({noise.value:,.0f} images, "
            f"{noise.low:,.0f} to {noise.high:,.0f}): more images a step buy little there; "
            f"{_instead(recipe, round(noise.high))}"
        )
    if steps_per_epoch < _FEW_STEPS:
        found.append(
            f"{steps_per_epoch} steps make an epoch of {images:,} images: with fewer than {_FEW_STEPS} the "
            f"schedule is coarse; {_instead(recipe, images // _FEW_STEPS)}"
        )
    if preset == "fine-tune" and not recipe.init_from:
        found.append("without --init-from it begins with random weights, for which these rates are low")
    elif recipe.freeze == "backbone" and not recipe.init_from:
        found.append(
            "--freeze backbone without --init-from: the last layer learns from features of random weights"
        )
    if recipe.optimizer == "lamb" and recipe.learning_rate >= _LARGE_FOR_LAMB:
        usual = 0.0035 * math.sqrt(recipe.reference_batch / 256)
        found.append(
            f"each step of LAMB changes a tensor by about the learning rate times its own length, "
            f"and {recipe.learning_rate:g} for {recipe.reference_batch} images is a lot; "
            f"--learning-rate {usual:.2g} --lr-rule sqrt is a beginning"
        )
    warmup = recipe.warmup_epochs * steps_per_epoch
    if recipe.warmup == "gradual" and 0 < warmup < _SHORT_WARMUP and batch > recipe.reference_batch:
        epochs = -(-_SHORT_WARMUP // steps_per_epoch)
        found.append(
            f"the warmup has {warmup:.0f} steps: the learning rate grows fast in so few; --warmup-epochs {epochs} "
            f"gives {epochs * steps_per_epoch}"
        )
    return found


def _instead(recipe: Recipe, most: int) -> str:
    """The largest number of virtual workers with the same n that stays within so many images."""
    gpus = most // recipe.per_gpu_batch
    if gpus >= 1:
        return f"--gpus {gpus} makes a minibatch of {gpus * recipe.per_gpu_batch:,} images"
    return (
        f"--gpus 1 --per-gpu-batch {max(1, most)} makes a minibatch of {max(1, most)} image{'s' * (most > 1)}"
    )
