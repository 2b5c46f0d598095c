"""`hvd-lb compare` as its user meets it: what is printed, the last line, the exit code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_lb.recipe import Recipe
from hvd_lb.training.checkpoint import CheckpointStore

# The fixture of conftest.py: arguments to what was said.
Run = Callable[..., Any]


def make_run(path: Path, *, shift: float = 0.0, seed: int = 0, processes: int = 2, step: int = 22) -> Path:
    """A run of twelve layers; `shift` moves the loss, and the weights of layer i by i times as much."""
    path.mkdir()
    (path / "recipe.yaml").write_text(Recipe(data="digits", model="resnet8", seed=seed).to_yaml())
    (path / "environment.json").write_text(json.dumps({"processes": processes}))
    record = {"kind": "train", "epoch": 0, "step": 9, "lr": 0.1, "loss": 2.5 + shift}
    (path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    model = {f"layers.{i}.weight": torch.full((4,), 4.0 + i * shift) for i in range(12)}
    CheckpointStore(path / "checkpoints").save(step, model, {}, {})
    return path


def test_identical(hvd_lb: Run, tmp_path: Path) -> None:
    said = hvd_lb(
        "compare", make_run(tmp_path / "[red]a", processes=2), make_run(tmp_path / "b", processes=1)
    )
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines() == [
        f"A: {tmp_path}/[red]a",
        f"B: {tmp_path}/b",
        "recipe: same mathematics",
        "environment: processes: 2 → 1",
        "train metrics: 1 and 1 records, 1 compared: equal",
        "eval metrics: 0 and 0 records, 0 compared",
        "checkpoint: step 22: 0 of 12 tensors differ",
        "bitwise identical",
    ]


def test_different(hvd_lb: Run, tmp_path: Path) -> None:
    said = hvd_lb("compare", make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=0.25, seed=1))
    assert (said.status, said.err) == (1, "")
    lines = said.out.splitlines()
    assert "recipe: mathematics differ: seed: 0 → 1" in lines
    assert "train loss: first at step 9: 2.5 → 2.75, by 0.25; in 1 record, at most by 0.25" in lines
    assert "model layers.11.weight: 2.75 (relative 0.41), 4 of 4 elements" in lines
    assert lines[-2] == "… and 1 more"
    assert lines[-1] == (
        "different: mathematics of the recipe, train metrics, 11 of 12 tensors; "
        "largest weight difference: 2.75 (relative 0.41) in model layers.11.weight"
    )
    listed = [line for line in lines if line.startswith("model ")]
    assert len(listed) == 10
    few = hvd_lb("compare", tmp_path / "a", tmp_path / "b", "--tensors", 2).out.splitlines()
    assert [line for line in few if line.startswith("model ")] == listed[:2]
    assert few[-2:] == ["… and 9 more", lines[-1]]


def test_a_table_on_a_terminal(hvd_lb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    said = hvd_lb("compare", make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=0.25))
    assert said.status == 1
    assert all(word in said.out for word in ("largest difference", "layers.11.weight", "… and 1 more"))
    assert "model layers.11.weight: " not in said.out
    assert said.out.splitlines()[-1].startswith("different: train metrics, 11 of 12 tensors")


def test_no_checkpoint_in_common(hvd_lb: Run, tmp_path: Path) -> None:
    said = hvd_lb("compare", make_run(tmp_path / "a"), make_run(tmp_path / "b", step=44))
    assert said.status == 1
    assert said.out.splitlines()[-1] == "different: weights not compared (no checkpoint in common)"


def test_bad_input_is_one_line_and_never_the_exit_code_of_a_difference(hvd_lb: Run, tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (other / "metrics.jsonl").unlink()
    (other / "metrics.jsonl").mkdir()
    for arguments, told in (
        ((run, tmp_path / "nowhere"), "nowhere does not exist"),
        ((run, tmp_path), "is neither a run nor a checkpoint"),
        ((run, run, "--step", 23), "has no checkpoint of step 23: it has step 22"),
        ((run, other), "metrics.jsonl cannot be read"),
        ((run,), "RUN_B"),
        ((run, run, "--most-steps", 3), "--most-steps is for steps that are taken again: add --replay"),
    ):
        said = hvd_lb("compare", *arguments)
        assert (said.status, said.out) == (2, "")
        assert told in said.err
        assert said.err.count("\n") == 1


def test_help_shows_an_example(hvd_lb: Run) -> None:
    said = hvd_lb("compare", "--help")
    assert said.status == 0
    assert "hvd-lb compare runs/" in said.out
