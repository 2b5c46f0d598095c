"""`hvd-lb compare --replay`: the first step and the first tensor in which two runs part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from metrics_lines import lines, rewrite

from hvd_lb.replay.again import Again
from hvd_lb.replay.parting import _start
from hvd_lb.replay.recorded import open_run

pytestmark = pytest.mark.slow
Run = Callable[..., Any]
Copied = Callable[[Path], Path]


def test_runs_of_two_recipes(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    """Of other lengths, so the learning rates fall otherwise: not in step 0, but from step 1 on."""
    run = copied(recorded)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("epochs: 30\n", "epochs: 20\n", 1))
    said = hvd_lb("compare", recorded, run, "--replay", "--most-steps", 5)
    assert said.status == 1
    assert "taken again: they part in step 1: first in stem.0.weight, of " in said.out, said
    assert "B by itself: is not what its recipe gives here: step 1: " in said.out
    assert "A by itself" not in said.out


def test_a_run_that_is_not_what_its_recipe_gives(
    hvd_lb: Run, recorded: Path, copied: Copied, tmp_path: Path
) -> None:
    """Its checkpoints are all as they were. The data have been moved."""
    run = copied(recorded)
    records = lines(run)
    wrong = next(record for record in records if record["kind"] == "train" and record["step"] == 11)
    wrong["loss"] = math.nextafter(wrong["loss"], 9)
    rewrite(run, records)
    said = hvd_lb("compare", recorded, run, "--replay", "--most-steps", 5)
    assert "taken again: steps 8 to 12: both recipes give the same bits here" in said.out, said
    assert "B by itself: is not what its recipe gives here: step 11: loss recorded " in said.out
    assert "A by itself" not in said.out
    said = hvd_lb("compare", recorded, run, "--replay", "--most-steps", 2)
    assert "the first different record is of step 11: see --most-steps" in said.out
    assert "B by itself" not in said.out
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("data: digits", f"data: {tmp_path / 'moved'}", 1))
    moved = ("compare", recorded, run, "--replay", "--most-steps", 1)
    assert hvd_lb(*moved).status == 2
    assert "steps 8 to 8: both recipes" in hvd_lb(*moved, "--data", "digits").out
    assert "add --replay" in hvd_lb("compare", recorded, run, "--data", "digits").err


def test_runs_of_which_nothing_differs(hvd_lb: Run, recorded: Path, copied: Copied) -> None:
    said = hvd_lb("compare", recorded, copied(recorded), "--replay")
    assert said.status == 0
    assert (
        "taken again: no step: after 30 steps both have the same checkpoint, and no record of a step before differs"
    ) in said.out.splitlines()


def test_float_mode_is_not_held_to_bits(hvd_lb: Run, in_float_mode: Path, copied: Copied) -> None:
    """As a run of two processes: its records are another's sums."""
    run = copied(in_float_mode)
    records = lines(run)
    for record in records:
        if record["kind"] == "environment":
            record["processes"] = 2
        if record["kind"] == "train" and record["step"] == 11:
            record["loss"] *= 1 + 1e-6
    rewrite(run, records)
    said = hvd_lb("compare", in_float_mode, run, "--replay", "--most-steps", 5)
    assert "taken again: steps 8 to 12: both recipes give the same bits here" in said.out, said
    assert (
        "B by itself: is as recorded to rounding; bits are not expected: it is a run in float mode on 2"
        in said.out
    )
    assert "A by itself" not in said.out


def test_from_where_on_both_are_taken_again(recorded: Path) -> None:
    """The newest checkpoint before the first difference; that of 8 steps knows step 7."""
    run = open_run(recorded)
    assert [_start(run, run, step)[0] for step in (7, 8, 15, None)] == [0, 8, 8, 30]


def test_each_run_has_its_own_threads(recorded: Path) -> None:
    one = open_run(recorded)
    other = replace(one, recipe=one.recipe.model_copy(update={"threads": 2}))
    both = [Again(run, run.open_data(None, None), torch.device("cpu"), None) for run in (one, other)]
    threads = []
    for again in both:
        again.take(1, before=lambda step: threads.append(torch.get_num_threads()))
    assert threads == [1, 2]
