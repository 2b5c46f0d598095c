"""Recipes: presets, YAML in and out, and one line for each mistake."""

import itertools
import math
import re
from pathlib import Path

import pytest

import hvd_lb
from hvd_lb.errors import UserError
from hvd_lb.recipe import (
    FREE_FIELDS,
    Recipe,
    differing_fields,
    load_values,
    make_recipe,
    period_in_seconds,
    period_in_steps,
    preset_names,
)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_survive_yaml(name: str, tmp_path: Path) -> None:
    recipe = make_recipe(load_values(name), name)
    assert recipe.description
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert make_recipe(load_values(str(file)), "file") == recipe


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_first_lines_tell_source_accuracy_and_time(name: str) -> None:
    """Those that were published have figures; what there is none of is said."""
    lines = (Path(hvd_lb.__file__).with_name("recipes") / f"{name}.yaml").read_text().splitlines()
    head = " ".join(line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines))
    parts = dict(re.findall(r"(Source|Accuracy|Time)(?:, [a-z ]+)?: (.*?)(?= (?:Accuracy|Time)\b|$)", head))
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|\S+)", parts["Source"])
    assert re.search(r"[\d.]+ % top-1|depends on the data", parts["Accuracy"])
    assert re.search(r"\d (s|hours|hour|minutes) on|none was|epochs", parts["Time"])
    if name.startswith("goyal"):
        assert "1706.02677" in parts["Source"]
        assert "P100" in parts["Time"]


@pytest.mark.parametrize("model", ["resnet50", "resnet101"])
def test_the_papers_presets_have_the_papers_numbers(model: str) -> None:
    values = load_values(f"goyal-{model}")
    paper = {
        "model": model, "per_gpu_batch": 32, "epochs": 90, "learning_rate": 0.1, "lr_rule": "linear",
        "warmup": "gradual", "warmup_epochs": 5, "schedule": "step", "drop_epochs": [30, 60, 80], "drop_factor": 0.1,
        "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "zero_gamma": True, "bn_momentum": 0.1,
        "image_size": 224, "eval_crop": 224 / 256, "flip": 0.5,
    }  # fmt: skip
    assert {name: values[name] for name in paper} == paper


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"gpuz": 1}, "unknown field 'gpuz'; did you mean 'gpus'"),
        ({"gpus": 0}, "gpus = 0"),
        ({"per_gpu_batch": -3}, "per_gpu_batch = -3"),
        ({"epochs": "many"}, "epochs = 'many'"),
        ({"lr_rule": "cubic"}, "lr_rule = 'cubic'"),
        ({"momentum_form": 9, "momentum_correction": False}, "form 9 needs no correction"),
        ({"compress": "fp16", "reproducible": True}, "the same bits need exact sums"),
        ({"momentum": 0.0}, "nesterov needs a momentum"),
        ({"eval_every": "sometimes"}, "such as 500steps"),
        ({"eval_every": "0steps"}, "such as 500steps"),
        ({"crop_scale": [0.5, 0.1]}, "crop_scale = [0.5, 0.1]: expected two increasing"),
        ({"crop_scale": [0.5, 1.5]}, "at most 1"),
        ({"std": [0, 1, 1]}, "std"),
        ({"drop_epochs": [60, 30]}, "increasing epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_mistakes_get_one_line(values: dict[str, object], told: str) -> None:
    with pytest.raises(UserError) as error:
        make_recipe(values, "mine.yaml")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("mine.yaml: ")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "gpus: 1: 2", "- x"])
def test_a_file_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_values(str(tmp_path / "bad.yaml"))


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'goyal-resnet50'"):
        load_values("goyal-resnet-50")


def test_periods() -> None:
    assert period_in_steps("500steps", 7) == 500
    assert period_in_steps("2 epochs", 7) == 14
    assert period_in_steps("never", 7) == period_in_steps("10min", 7) == 0
    assert period_in_seconds("10min") == 600
    assert period_in_seconds("500steps") == period_in_seconds("never") == math.inf
    assert Recipe(checkpoint_every="10min").checkpoint_every == "10min"
    with pytest.raises(UserError, match="expected a period such as 500steps, 1epoch or never"):
        make_recipe({"eval_every": "10min"})


def test_mathematics_leaves_out_what_may_change_on_the_way() -> None:
    assert {"steps", "log_every", "threads", "data", "checkpoint_every"} <= FREE_FIELDS
    assert not {"seed", "gpus", "epochs", "precision", "antialias"} & FREE_FIELDS
    a, b = Recipe(seed=1, log_every=3), Recipe(seed=2, log_every=5)
    assert differing_fields(a.mathematics(), b.mathematics()) == ["seed: 1 → 2"]
    assert Recipe(log_every=3).digest() == Recipe().digest() != Recipe(seed=1).digest()


def test_a_run_keeps_its_name_in_later_versions() -> None:
    """Whatever fields these add: one that changes here moves every run to another default directory."""
    assert Recipe(data="digits", model="resnet8", gpus=4).digest() == "403d2608"
    assert Recipe(data="digits", model="resnet8", gpus=4, mixup=0.5).digest() != "403d2608"


def test_what_rounds_is_mathematics_of_a_reproducible_run() -> None:
    rounding = {"threads": 2, "channels_last": True, "compile": True}
    assert Recipe(**rounding).mathematics() == Recipe().mathematics()
    exact = Recipe(reproducible=True)
    assert exact.threads == 1
    for name, value in rounding.items():
        changed = Recipe(reproducible=True, **{name: value})
        assert [d.split(":")[0] for d in differing_fields(exact.mathematics(), changed.mathematics())] == [
            name
        ]


def test_the_period_of_evaluations_counts_where_they_change_the_statistics() -> None:
    with_it = [Recipe(recompute_bn=9, eval_every=every).mathematics() for every in ("1epoch", "7steps")]
    assert with_it[0] != with_it[1]
    assert Recipe(eval_every="7steps").mathematics() == Recipe().mathematics()


@pytest.mark.parametrize("value", [0, -1, 2**21, True, 2.0, "x", "4", [1]])
def test_workers_together_are_a_number_or_auto(value: object) -> None:
    with pytest.raises(UserError, match="together.*expected auto or a number of virtual workers from 1 to"):
        make_recipe({"together": value})


def test_groups_belong_to_reproducible_runs_only() -> None:
    """And only where there are any: older recipes, which have no such field, are the same run."""
    for values in ({"together": 4}, {"reproducible": True}, {"reproducible": True, "together": 1}):
        recipe = make_recipe(values)
        assert "together" not in recipe.mathematics()
        assert recipe.fixed_group == 1
    recipe = make_recipe({"reproducible": True, "together": 4})
    assert recipe.mathematics()["together"] == recipe.fixed_group == 4
