"""Which runs a sweep is made of, and what is refused before any of them starts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe
from hvd_lb.sweep import plan
from hvd_lb.sweep.plan import Grid, Sweep, grown, open_sweep, text_of
from hvd_lb.training.models import build_model

BASE = Recipe(data="digits", model="resnet8", image_size=8, per_gpu_batch=8, epochs=3, warmup_epochs=1)


def sweep(*grids: Grid, folder: Path = Path("s")) -> Sweep:
    return Sweep(folder, BASE, "simulate", grids)


def test_every_combination_has_its_seeds_and_every_setting_comes_early() -> None:
    of = sweep(Grid({"gpus": (2, 16), "warmup": ("gradual", "none")}, 2))
    assert [point.name for point in of.points()] == [
        f"gpus={gpus},warmup={warmup},seed={seed}"
        for seed in (0, 1)
        for gpus in (2, 16)
        for warmup in ("gradual", "none")
    ]
    point = of.points()[5]
    assert (point.recipe.gpus, point.recipe.warmup, point.recipe.seed) == (2, "none", 1)
    assert point.recipe == BASE.model_copy(update={"gpus": 2, "warmup": "none", "seed": 1})
    assert point.run.path == Path("s/runs/gpus=2,warmup=none,seed=1")


def test_what_two_grids_have_in_common_is_one_run_with_the_most_seeds() -> None:
    of = sweep(Grid({"gpus": (2, 4)}, 3), Grid({"gpus": (4,), "warmup": ("gradual", "none")}, 5))
    assert [(setting.name, seeds) for setting, seeds in of.settings().items()] == [
        ("gpus=2", 3),
        ("gpus=4", 5),
        ("gpus=4, warmup=none", 5),
    ]
    assert len(of.points()) == len({point.name for point in of.points()}) == 13
    assert of.fields() == ["gpus", "warmup"]


def test_values_that_differ_in_their_last_digit_are_runs_of_their_own() -> None:
    of = sweep(Grid({"learning_rate": (0.1, 0.1000001)}, 1))
    assert len({point.run.path for point in of.points()}) == 2
    assert [text_of(value) for value in (0.1, 2.0, True, (0.5, 1.0), 1e-5)] == [
        "0.1",
        "2",
        "true",
        "0.5+1",
        "1e-05",
    ]


def test_a_setting_is_found_by_what_is_written() -> None:
    of = sweep(Grid({"gpus": (2, 4)}, 1), Grid({"gpus": (4,), "warmup": ("none",)}, 1))
    with_base = of.with_grid(Grid({}, 1))  # the recipe is a setting, which nothing but its name stands for
    assert with_base.setting("as it is").name == "as it is"
    assert of.setting("gpus=4").name == "gpus=4"  # the recipe's warmup
    assert of.setting("warmup=none").name == of.setting("gpus=4,warmup=none").name == "gpus=4, warmup=none"
    for wrong, said in (
        ("gpus=5", "no setting is so"),
        ("gpu=4", "gpu is not varied here; did you mean 'gpus'"),
        ("2", "expected FIELD=VALUE for '2', such as gpus=8"),
        ("gpus 2", "expected FIELD=VALUE for 'gpus 2'"),
        ("gpus=4, none", "expected FIELD=VALUE for 'none'"),
        ("nonsense", "expected FIELD=VALUE"),
        ("", "expected FIELD=VALUE"),
        ("gpus=2,gpus=4", "gpus is given twice"),
    ):
        for base in (of, with_base):
            with pytest.raises(UserError, match=said):
                base.setting(wrong)


def test_it_is_kept_and_grows(tmp_path: Path) -> None:
    of = sweep(Grid({"crop_scale": ((0.5, 1.0), (0.9, 1.0)), "nesterov": (True, False)}, 2), folder=tmp_path)
    of.save()
    again = open_sweep(tmp_path)
    assert again == of
    assert [point.recipe for point in again.points()] == [point.recipe for point in of.points()]
    more = grown(tmp_path, BASE, "simulate").with_grid(Grid({"gpus": (2,)}, 1))
    assert more.points()[:4] == of.points()[:4]
    assert more.with_grid(Grid({"gpus": (2,)}, 1)) == more
    free = BASE.model_copy(update={"eval_every": "never"})
    assert grown(tmp_path, free, "simulate").base == free
    longer = BASE.model_copy(update={"steps": 9})
    (tmp_path / "steps").mkdir()
    Sweep(tmp_path / "steps", longer, "simulate").save()
    assert grown(tmp_path / "steps", BASE, "simulate").base == BASE
    with pytest.raises(UserError, match="steps: 9 → 8"):
        grown(tmp_path / "steps", BASE.model_copy(update={"steps": 8}), "simulate")
    for base, mode, said in (
        (longer, "simulate", "steps: none → 9"),
        (BASE.model_copy(update={"epochs": 4}), "simulate", "epochs: 3 → 4"),
        (BASE.model_copy(update={"data": "fashion-mnist"}), "simulate", "data: digits → fashion-mnist"),
        (BASE, "train", "simulate → train"),
    ):
        with pytest.raises(UserError, match=said):
            grown(tmp_path, base, mode)  # type: ignore[arg-type]
    whole = (tmp_path / "sweep.json").read_text()
    for damaged in (whole[:9], whole.replace('"simulate"', '"x"'), "[" * 100_000):
        (tmp_path / "sweep.json").write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            open_sweep(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary", "gpu=8"], "gpu: no field of a recipe; did you mean 'gpus'?"),
        (["--vary", "nothing=1"], "--vary nothing: no field of a recipe\n"),
        (["--vary", "gpus"], "expected FIELD=VALUE,VALUE, such as gpus=8,32,128"),
        (["--vary", "gpus="], "expected FIELD=VALUE,VALUE"),
        (["--vary", "gpus=8,many"], "'many' is not a valid integer"),
        (["--vary", "gpus=8,0"], "--gpus 0: "),
        (["--vary", "gpus=8", "--vary", "gpus=16"], "gpus was given before"),
        (["--vary", "seed=1,2"], "give --seeds N"),
        (["--vary", "data=digits"], "give each a sweep of its own"),
        (["--vary", "threads=1,2"], "may change while a run goes on, so runs that differ in it alone are the same run"),
        (["--vary", "gpus=2,,4"], "expected a value between two commas"),
        (["--vary", "gpus=2,none"], "'none' is not a valid integer"),
        (["--vary", "nesterov=true,false", "--optimizer", "lamb"], "--nesterov has no effect with optimizer lamb"),
        (["--vary", "warmup=gradual,none", "--vary", "warmup_epochs=1,2"],
         "warmup=none, warmup_epochs=1: --warmup-epochs has no effect with warmup none"),
        (["--vary", "recompute_bn=none,9999"], "recompute_bn=9999: --recompute-bn 9999, but the data set has 1438"),
        (["--vary", "class_weights=none,balanced,no/file"], "no/file: cannot be read"),
        (["--vary", "init_from=none,no/weights"], "no/weights is not there"),
        (["--vary", "gpus=2,8", "--train", "--processes", "4", "--device", "cpu"],
         "gpus=2: --processes 4 for 2 virtual workers: expected 1 to 2"),
        (["--vary", "warmup=gradual,slow"], "'slow' is not one of gradual, constant, none"),
        (["--vary", "nesterov=true,maybe"], "'maybe' is neither true nor false"),
        (["--vary", "gpus=2,4096"], "gpus=4096: "),
        (["--vary", "gpus=2,16", "--vary", "warmup_epochs=1,40"],
         "gpus=16, warmup_epochs=40: the warmup is no shorter than the run"),
        (["--vary", "gpus=2", "--seeds", "10000", "--vary", "flip=" + ",".join(f"0.{i}" for i in range(1, 21))],
         "180,000 runs in one grid"),
        (["--vary", "gpus=2", "--track", "neptune"], "--track neptune: expected mlflow"),
        (["--vary", "gpus=2", "--processes", "2"], "--processes is for --train"),
        (["--vary", "gpus=2", "--momentum-form", "9", "--no-momentum-correction"], "form 9 needs no correction"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_and_nothing_is_written(
    hvd_lb: Callable[..., Any], tmp_path: Path, words: list[str], said: str
) -> None:
    found = hvd_lb("sweep", "run", tmp_path / "s", "--data", "digits", *words)
    assert (found.status, found.out) == (2, "")
    assert said in found.err
    assert found.err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_dry_run_names_the_runs_and_run_may_be_left_out(
    hvd_lb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "--data",
        "digits",
        "--schedule",
        "step",
        "--vary",
        "gpus=2,4",
        "--vary=drop-epochs=30,60;45",
        "--seeds",
        2,
        "--dry-run",
    )
    found = hvd_lb("sweep", *words)
    assert (found.status, found.err) == (0, "")
    first, *runs = found.out.splitlines()
    assert first.startswith("sweeps/digits-resnet8-1x32-")
    assert first.endswith(": 4 settings, 8 runs: 0 ended, 8 to go")
    assert runs[:2] == ["to go  gpus=2,drop_epochs=30+60,seed=0", "to go  gpus=2,drop_epochs=45,seed=0"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    other = hvd_lb("sweep", "run", tmp_path / "full", *words)
    assert (other.status, other.out) == (2, "")
    assert "holds something that is no sweep" in other.err
    monkeypatch.setenv("HVD_LB_DATA", "digits")  # with which a folder that is mistyped would be a new sweep
    mistyped = hvd_lb("sweep", "run", tmp_path / "ful", "--jobs", 2)
    assert (mistyped.status, mistyped.out) == (2, "")
    assert mistyped.err.endswith(
        "ful: is no sweep to go on with; a new one takes --data, and --vary FIELD=VALUES\n"
    )


def test_fields_that_are_not_set_and_paths(
    hvd_lb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`none` is a value like others; files are read beforehand, and told by where they are from anywhere."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        weights = build_model("resnet8", 10, seed=ord(folder)).state_dict()
        save_file(weights, tmp_path / folder / "w.safetensors")
        (tmp_path / folder / "classes.txt").write_text("".join(f"{name} 1\n" for name in range(10)))
    grids = (
        "ema=none,0.99",
        "init_from=none,a/w.safetensors,b/w.safetensors",
        "class_weights=none,balanced,a/classes.txt",
        "progressive_size=none;4",
    )
    words = [word for grid in grids for word in ("--vary", grid)]
    said = hvd_lb(*("sweep", "run", "s", "--data", "digits", "--model", "resnet8"), *words, "--dry-run")
    assert (said.status, said.err) == (0, "")
    names = [line.split()[-1] for line in said.out.splitlines()[1:]]
    assert len(set(names)) == 2 * 3 * 3 * 2
    assert names[0] == "ema=none,init_from=none,class_weights=none,progressive_size=none,seed=0"
    assert re.fullmatch(
        r"ema=0\.99,init_from=w\.safetensors-[0-9a-f]{8},class_weights=classes\.txt-[0-9a-f]{8},progressive_size=4,"
        "seed=0",
        names[-1],
    )

    base = BASE.model_copy(update={"ema": 0.9, "num_classes": 10})
    of = Sweep(
        tmp_path / "kept", base, "simulate", (Grid({"ema": (None, 0.5), "progressive_size": ((), (4,))}, 1),)
    )
    of.folder.mkdir()
    of.save()
    again = open_sweep(of.folder)
    assert again == of
    assert [(point.recipe.ema, point.recipe.progressive_size) for point in again.points()] == [
        (None, ()),
        (None, (4,)),
        (0.5, ()),
        (0.5, (4,)),
    ]
    assert again.setting("ema=none, progressive_size=4").values == {"ema": None, "progressive_size": (4,)}


def test_a_recipe_is_made_once_for_each_run(
    hvd_lb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for each setting whenever one is asked about: a sweep may have thousands."""
    made, make = [], plan.make_recipe
    monkeypatch.setattr(plan, "make_recipe", lambda *given: made.append(given) or make(*given))
    words = ("--vary", "gpus=2,4", "--vary", "flip=" + ",".join(f"0.{i}" for i in range(10, 40)))
    folder = tmp_path / "s"
    said = hvd_lb("sweep", "run", folder, "--data", "digits", *words, "--seeds", 3, "--dry-run")
    assert "60 settings, 180 runs" in said.out
    assert len(made) == 180
    grids = (Grid({"gpus": (2, 4), "flip": tuple(i / 100 for i in range(30))}, 3),)
    of = Sweep(folder, BASE, "simulate", grids)
    folder.mkdir()
    of.save()
    for command in (
        ("table",),
        ("status",),
        ("figure", "--output", tmp_path / "a.png", "--curves", "gpus=2, flip=0.1"),
    ):
        made.clear()
        hvd_lb("sweep", command[0], folder, *command[1:])
        assert len(made) <= 181, command


@pytest.mark.parametrize("command", ["status", "table", "figure"])
def test_a_folder_without_a_sweep(hvd_lb: Callable[..., Any], tmp_path: Path, command: str) -> None:
    more = ("--output", tmp_path / "a.png") if command == "figure" else ()
    found = hvd_lb("sweep", command, tmp_path, *more)
    assert found.status == 2
    assert "holds no sweep" in found.err
