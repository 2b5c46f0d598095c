"""`hvd-lb compare --replay`: the first step and the first tensor in which two runs part."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from metrics_lines import lines, rewrite

pytestmark = pytest.mark.slow
Run = Callable[..., Any]


def test_runs_of_two_recipes(hvd_lb: Run, recorded: Path, copied: Callable[[Path], Path]) -> None:
    """Of other lengths, so the learning rates fall otherwise: not in step 0, but from step 1 on."""
    run = copied(recorded)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("epochs: 30\n", "epochs: 20\n", 1))
    for path in (run / "checkpoints").iterdir():
        path.rename(path.with_name(f"gone-{path.name}"))
    said = hvd_lb("compare", recorded, run, "--replay", "--most-steps", 5)
    assert said.status == 1
    assert "taken again: they part in step 1: first in stem.0.weight, of " in said.out, said
    assert "B by itself: is not what its recipe gives here: step 1: " in said.out
    assert "A by itself" not in said.out


@pytest.mark.long
def test_a_run_that_is_not_what_its_recipe_gives(
    hvd_lb: Run, recorded: Path, copied: Callable[[Path], Path]
) -> None:
    run = copied(recorded)
    for path in (run / "checkpoints").iterdir():
        if path.name != "step-00000008":
            path.rename(path.with_name(f"gone-{path.name}"))
    records = lines(run)
    wrong = next(record for record in records if record["kind"] == "train" and record["step"] == 11)
    wrong["loss"] = math.nextafter(wrong["loss"], 9)
    rewrite(run, records)
    said = hvd_lb("compare", recorded, run, "--replay", "--most-steps", 5)
    assert "taken again: steps 8 to 12: both recipes give the same bits here" in said.out, said
    assert "B by itself: is not what its recipe gives here: step 11: loss recorded " in said.out
