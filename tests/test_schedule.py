"""The learning rate of every step, against the paper's numbers (section 5.1, Table 2 and PAPER's recipe)."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest

from hvd_lb.errors import UserError
from hvd_lb.schedule import REFERENCE_EPOCHS, Schedule, scaled_learning_rate


def paper(gpus: int, images: int = 1_281_167, epochs: int = 90, **changes: object) -> Schedule:
    batch = gpus * 32
    return Schedule(
        learning_rate=0.1, global_batch=batch, steps_per_epoch=images // batch, epochs=epochs, **changes
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "rate"), [(128, 0.05), (256, 0.1), (512, 0.2), (8192, 3.2), (16384, 6.4), (65536, 25.6)]
)
def test_linear_scaling_gives_the_papers_rates(images: int, rate: float) -> None:
    assert scaled_learning_rate(0.1, images) == pytest.approx(rate, rel=1e-15)


def test_other_rules() -> None:
    assert scaled_learning_rate(0.1, 8192, "sqrt") == pytest.approx(0.1 * math.sqrt(32))
    assert scaled_learning_rate(0.1, 8192, "none") == 0.1


def test_a_rate_found_with_another_minibatch() -> None:
    """A rate for 32 images is scaled from there, and warmup begins there."""
    assert scaled_learning_rate(0.1, 1024, reference_batch=32) == pytest.approx(3.2, rel=1e-15)
    assert scaled_learning_rate(0.1, 128, "sqrt", reference_batch=32) == pytest.approx(0.2, rel=1e-15)
    schedule = Schedule(0.1, global_batch=128, steps_per_epoch=10, epochs=30, reference_batch=32)
    assert [schedule(step) for step in (0, 25, 50)] == pytest.approx([0.1, 0.25, 0.4], rel=1e-12)
    assert schedule.describe().startswith(
        "0.1 × 128/32 = 0.4; gradual warmup from 0.1 over 5 epochs (50 steps)"
    )
    smaller = Schedule(0.1, global_batch=16, steps_per_epoch=10, epochs=30, reference_batch=32)
    assert (smaller(0), smaller.warmup_steps) == (0.05, 0)


def test_every_step_of_the_8k_run() -> None:
    """156 steps an epoch; an independent statement of the recipe, step by step."""
    schedule = paper(256)
    assert schedule.steps_per_epoch == 156
    increment = (3.2 - 0.1) / (5 * 156)
    for step in range(90 * 156):
        epoch = step // 156
        expected = (
            0.1 + increment * step if epoch < 5 else 3.2 / 10 ** sum(epoch >= drop for drop in (30, 60, 80))
        )
        assert schedule(step) == pytest.approx(expected, rel=1e-12), step


def test_warmup_grows_by_the_same_amount_at_every_iteration() -> None:
    schedule = paper(256)
    rates = [schedule(step) for step in range(schedule.warmup_steps + 1)]
    increments = [b - a for a, b in zip(rates, rates[1:], strict=False)]
    assert rates[0] == 0.1
    assert rates[-1] == schedule.peak
    assert max(increments) - min(increments) < 1e-12


@pytest.mark.parametrize("gpus", [4, 8])
def test_no_warmup_up_to_256_images(gpus: int) -> None:
    assert paper(gpus).warmup_steps == 0
    assert paper(gpus)(0) == paper(gpus).peak


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"shape": "cosin"},
            "shape 'cosin': expected one of step, cosine, polynomial; did you mean 'cosine'",
        ),
        ({"rule": "square"}, "rule 'square'"),
        ({"warmup": "linear"}, "warmup 'linear'"),
        ({"learning_rate": math.inf}, "learning_rate inf: expected a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate nan"),
        ({"global_batch": 0}, "global_batch 0"),
        ({"reference_batch": 0}, "reference_batch 0: expected a finite number above 0"),
        ({"steps_per_epoch": -1}, "steps_per_epoch -1"),
        ({"epochs": 0}, "epochs 0"),
        ({"drop_factor": math.nan}, "drop_factor nan"),
        ({"power": math.inf}, "power inf"),
        ({"warmup_epochs": math.nan}, "warmup_epochs nan"),
        ({"warmup_epochs": -1}, "warmup_epochs -1"),
        ({"drop_epochs": (30, math.nan)}, "increasing epochs of a run of 90"),
        ({"drop_epochs": (100, 150)}, "increasing epochs of a run of 90"),
        ({"drop_epochs": (60, 30)}, "increasing epochs of a run of 90"),
        ({"drop_epochs": 30}, "drop_epochs 30: expected increasing epochs"),
        ({"drop_epochs": ("30", "60")}, "increasing epochs of a run of 90"),
        ({"learning_rate": "0.1"}, "learning_rate '0.1': expected a finite number"),
        ({"warmup_epochs": None}, "warmup_epochs None: expected a finite number"),
        ({"rule": "Linear"}, "rule 'Linear': expected one of linear, sqrt, none; did you mean 'linear'"),
    ],
)
def test_what_is_no_schedule(changes: dict[str, object], told: str) -> None:
    values = {"learning_rate": 0.1, "global_batch": 256, "steps_per_epoch": 10, "epochs": 90, **changes}
    with pytest.raises(UserError, match=told):
        Schedule(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0.1, 512, "Linear"), "rule 'Linear': expected one of linear, sqrt, none; did you mean 'linear'"),
        ((0.1, 0), "global_batch 0: expected a finite number above 0"),
        ((0.1, 512, "sqrt", -256), "reference_batch -256"),
    ],
)
def test_what_is_not_scaled(arguments: tuple, told: str) -> None:
    with pytest.raises(UserError, match=told):
        scaled_learning_rate(*arguments)


def test_constant_warmup_and_none() -> None:
    constant = paper(256, warmup="constant")
    assert {constant(step) for step in range(780)} == {0.1}
    assert constant(780) == 3.2
    assert paper(256, warmup="none")(0) == 3.2


@pytest.mark.parametrize("epochs", [9, 18, 45, 90, 180])
def test_drops_scale_with_the_length_of_the_run(epochs: int) -> None:
    schedule = paper(8, epochs=epochs)
    for part, drop in zip((1 / 3, 2 / 3, 8 / 9), schedule.drop_steps, strict=True):
        assert drop == round(part * epochs * schedule.steps_per_epoch)
        assert schedule(drop) == pytest.approx(schedule(drop - 1) / 10)


def test_cosine_and_polynomial_end_at_zero() -> None:
    for shape in ("cosine", "polynomial"):
        schedule = paper(256, shape=shape)
        start, end = schedule.warmup_steps, schedule.total_steps
        assert schedule(start) == 3.2
        assert schedule(end) == 0
        rates = [schedule(step) for step in range(start, end)]
        assert rates == sorted(rates, reverse=True)
    assert paper(256, shape="cosine")((start + end) // 2) == pytest.approx(1.6)
    assert paper(256, shape="polynomial")((start + end) // 2) == pytest.approx(3.2 / 4)


def test_the_derivation_is_told() -> None:
    text = paper(256).describe()
    assert "0.1 × 8192/256 = 3.2" in text
    assert "gradual warmup from 0.1 over 5 epochs (780 steps)" in text
    assert "at epochs 30, 60, 80 of 90" in text


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="give warmup_epochs less than 5, or epochs more than 5"):
        paper(256, epochs=5)
    paper(8, epochs=5)


@pytest.mark.parametrize(
    ("epochs", "drops"), [(1, (4, 7, 9)), (2, (7, 14, 18)), (3, (10, 20, 27)), (7, (24, 47, 63))]
)
def test_a_drop_within_a_step_is_at_the_next_one(epochs: int, drops: tuple[int, ...]) -> None:
    """10 steps an epoch: thirds and ninths of a run that are no whole steps."""
    schedule = Schedule(learning_rate=0.1, global_batch=256, steps_per_epoch=10, epochs=epochs)
    assert schedule.drop_steps == drops
    for number, step in enumerate(drops):
        assert schedule(step - 1) == pytest.approx(0.1 / 10**number)
        assert schedule(step) == pytest.approx(0.1 / 10 ** (number + 1))


@pytest.mark.parametrize("epochs", [31, 62, 75, 83, 90, 93])
def test_drops_and_warmup_are_whole_steps_as_exact_fractions_say(epochs: int) -> None:
    """30 · (93 / 90) and 4.1 · 50 are a little off their whole numbers as floats."""
    for steps in range(1, 61):
        schedule = replace(paper(8), steps_per_epoch=steps, epochs=epochs)
        exact = [Fraction(drop * steps * epochs, REFERENCE_EPOCHS) for drop in schedule.drop_epochs]
        assert schedule.drop_steps == tuple(map(math.ceil, exact))
        for warmup in ("0.7", "2.3", "4.1"):
            schedule = replace(paper(64), steps_per_epoch=steps, epochs=epochs, warmup_epochs=float(warmup))
            assert abs(schedule.warmup_steps - Fraction(warmup) * steps) <= Fraction(1, 2)
