from __future__ import annotations

from hvd_lb.advice import advice
from hvd_lb.optim.noise_scale import NoiseEstimate
from hvd_lb.recipe import Recipe


def recipe(**fields: object) -> Recipe:
    return Recipe.model_validate({"per_gpu_batch": 32, "data": "synthetic", **fields})


def test_advice_names_another_minibatch() -> None:
    def said(recipe: Recipe, **given: object) -> list[str]:
        return advice(recipe, "goyal-resnet50", steps_per_epoch=156, images=1_281_167, **given)  # type: ignore[arg-type]

    assert said(recipe(gpus=256)) == []
    (beyond,) = said(recipe(gpus=512))
    assert "16,384" in beyond
    assert "--gpus 256 makes a minibatch of 8,192 images" in beyond
    (noisy,) = said(recipe(gpus=256), noise=NoiseEstimate(900, 700, 1200))
    assert "--gpus 37 makes a minibatch of 1,184 images" in noisy
    assert said(recipe(gpus=256), noise=NoiseEstimate(900, 700, None)) == []
    assert said(recipe(gpus=64), noise=NoiseEstimate(900, 700, 1200)) == []


def test_advice_on_few_steps_and_a_short_warmup() -> None:
    few = advice(recipe(gpus=16, warmup_epochs=2), "images", steps_per_epoch=8, images=4096)
    assert any(
        "8 steps make an epoch" in line and "--gpus 12 makes a minibatch of 384 images" in line
        for line in few
    )
    assert any("the warmup has 16 steps" in line and "--warmup-epochs 4 gives 32" in line for line in few)
    assert advice(recipe(gpus=16, warmup="none"), "images", steps_per_epoch=100, images=51200) == []


def test_advice_on_frozen_random_weights() -> None:
    def said(**fields: object) -> list[str]:
        return advice(recipe(gpus=1, freeze="backbone", **fields), "images", steps_per_epoch=100, images=3200)

    (line,) = said()
    assert "--freeze backbone without --init-from" in line
    assert said(init_from="runs/other") == []
