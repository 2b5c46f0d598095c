"""--class-weights, --sampling and --repeated-augment as they are typed, told, kept in recipe.yaml and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SIMULATE = ("simulate", "--data", "digits", "--device", "cpu", "--threads", 1, "--budget", "1s")
NAMES = [f"{number} {0.5 + number}" for number in range(10)]


@pytest.mark.slow
@pytest.mark.long  # two whole runs
def test_what_a_run_will_do_is_said(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("\n".join(NAMES) + "\n\n")
    run = tmp_path / "run"
    said = hvd_lb(
        *SIMULATE[:7], "--run", "--steps", 2, "--output", run, "--class-weights", file, "--sampling", "balanced",
        "--repeated-augment", 2, "--progressive-size", "6,7",
    )  # fmt: skip
    assert said.status == 0, said.err
    told = " ".join((said.out + said.err).split())
    assert "each of 10 classes 143.8 times an epoch: an image of the smallest (127) 1.13 times, " in told
    assert "one of the largest (161) 0.893 times" in told
    assert "each image 2 times in its minibatch" in told
    assert "6, 7, 8 pixels, for as many epochs each" in told
    assert "as given, scaled, so that their mean over the images is 1" in told
    # The run does not need the file any more.
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["class_weights"] == [0.5 + number for number in range(10)]
    assert recipe["progressive_size"] == [6, 7]
    file.unlink()
    again = hvd_lb(*SIMULATE[:7], "--run", "--recipe", run / "recipe.yaml", "--output", tmp_path / "again")
    assert again.status == 0, again.err
    ends = [folder / "checkpoints/last/model.safetensors" for folder in (run, tmp_path / "again")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "cannot be read (No such file or directory): expected balanced or a file"),
        (NAMES[:-1], "'9' has no line: expected a line NAME WEIGHT for each class"),
        ([*NAMES, "ten 1"], "'ten' is no class of the data"),
        ([*NAMES[:-1], "9 much"], "line 10: expected NAME WEIGHT, a number of at least 0, found '9 much'"),
        ([*NAMES[:-1], "9"], "line 10: expected NAME WEIGHT, a number of at least 0, found '9'"),
        ([*NAMES[:-1], "9 -1"], "line 10: expected NAME WEIGHT, a number of at least 0, found '9 -1'"),
        ([f"{number} 0" for number in range(10)], "expected weights of at least 0, not all of them 0"),
        ([*NAMES[:-1], "9 nan"], "line 10: expected NAME WEIGHT, a number of at least 0, found '9 nan'"),
        ([*NAMES[:-1], "9 inf"], "line 10: expected NAME WEIGHT, a number of at least 0, found '9 inf'"),
        ([*NAMES, "9 2"], "line 11: '9' has a line before this one"),
    ],
)
def test_weights_that_are_none(
    hvd_lb: Callable[..., Any], tmp_path: Path, lines: list[str] | None, said: str
) -> None:
    file = tmp_path / "weights"
    if lines is not None:
        file.write_text("\n".join(lines))
    found = hvd_lb(*SIMULATE, "--class-weights", file)
    assert found.status == 2
    assert said in " ".join(found.err.split())


def test_both_remedies_at_once(hvd_lb: Callable[..., Any]) -> None:
    found = hvd_lb(*SIMULATE, "--class-weights", "balanced", "--sampling", "balanced")
    assert found.status == 2
    assert "either is enough" in " ".join(found.err.split())


@pytest.mark.parametrize("more", [("--sampling", "balanced"), ("--repeated-augment", 2)])
def test_shares_of_workers_are_of_plain_epochs(hvd_lb: Callable[..., Any], more: tuple[Any, ...]) -> None:
    found = hvd_lb(*SIMULATE, "--shuffle", "per-worker", *more)
    assert found.status == 2
    assert "an ablation of plain epochs" in " ".join(found.err.split())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--beta2", "0.9", "--beta2 has no effect with optimizer sgd"),
        ("--progressive-size", "6.5", "is not whole numbers with commas between them"),
        ("--repeated-augment", "0", "--repeated-augment 0"),
        ("--ema", "1", "--ema 1"),
    ],
)
def test_other_options_in_one_line(hvd_lb: Callable[..., Any], option: str, value: str, said: str) -> None:
    found = hvd_lb(*SIMULATE, option, value)
    assert found.status == 2
    assert said in " ".join(found.err.split())
