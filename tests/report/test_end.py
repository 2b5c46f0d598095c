"""Summary, curves and page of a run, whatever its records, its name and the user's environment hold."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hvd_lb.report.page.runs import write_report
from hvd_lb.report.plots import plot_curves
from hvd_lb.report.run_directory import RunDirectory, strict_json, write_json
from hvd_lb.report.summary import ended_after, summarise

NAN = float("nan")


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "epoch": 0, "step": step, "lr": 0.1, "loss": 2.5, **more}


def evaluation(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "eval", "epoch": step, "step": step, "images": 9, **more}


CASES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "usual": [train(0), evaluation(1, top1_error=50.0, top5_error=5.0, loss=1.0)],
    "null": [train(0, loss=None, lr=None), evaluation(1, top1_error=None, top5_error=None, loss=None)],
    "absent": [
        {"kind": "train", "step": 0},
        {"kind": "eval", "step": 1},
        {"step": 1},
        {"kind": "x", "step": 9},
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.recipe.write_text("data: a\n")
    run.environment.write_text("{}")
    return run


def test_steps_that_were_given_up_are_not_done(run: RunDirectory) -> None:
    given_up = [
        {"kind": "rollback", "step": 9, "to": 2},
        {"kind": "repeat", "step": 2},
        {"kind": "warning", "step": 9, "message": "x"},
    ]
    run.metrics.write_text("".join(f"{strict_json(record)}\n" for record in (train(1), train(8), *given_up)))
    assert summarise(run, "interrupted", 1.0, total_steps=20, steps_per_epoch=2)[0]["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("records", CASES.values(), ids=CASES.keys())
def test_any_records_can_be_summed_up_and_drawn(run: RunDirectory, records: list[dict[str, Any]]) -> None:
    run.metrics.write_text("".join(f"{strict_json(record)}\n" for record in records) + '{"step"')
    summary, _ = summarise(run, "finished", 1.0, total_steps=10, steps_per_epoch=2)
    write_json(run.summary, summary)
    assert ended_after(run) == summary["steps"]
    assert plot_curves(records, 2, "a run")
    write_report(run, "a run")
    assert ('id="data"' in run.report.read_text("utf-8")) == any(
        record.get("kind") == "train" and "loss" in record for record in records
    )


def test_the_best_is_among_those_that_are_numbers(run: RunDirectory) -> None:
    errors = [None, 40.0, 30.0, 30.0]
    records = [
        evaluation(step, top1_error=error, top5_error=0.0, loss=None) for step, error in enumerate(errors)
    ]
    rates = [train(step, images_per_second=rate) for step, rate in enumerate((None, 1.0, 10.0, 99.0))]
    run.metrics.write_text("".join(f"{strict_json(record)}\n" for record in records + rates))
    summary, _ = summarise(run, "finished", 1.0, total_steps=10, steps_per_epoch=2)
    assert summary["best"]["step"] == 2
    assert summary["images_per_second"] == 10.0
    write_json(run.summary, {**summary, "wall_seconds": NAN})
    assert json.loads(run.summary.read_text(), parse_constant=pytest.fail)["wall_seconds"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["$x_y$", "runs_${DATASET}_${MODEL}", r"$\frac{", "a\nb", "训练 <b>&", "\udcff\x1b[1m", "%s {0} \\"],
)
def test_any_name_can_stand_over_the_curves(run: RunDirectory, name: str) -> None:
    curves = plot_curves(CASES["usual"], 2, name)
    with Image.open(io.BytesIO(curves)) as picture:
        assert picture.size == (990, 715)
    write_report(run, name)
    assert "<b>" not in run.report.read_text("utf-8")


@pytest.mark.slow
def test_neither_a_notebooks_backend_nor_a_matplotlibrc_matters(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: red\n")
    program = "from hvd_lb.report.plots import plot_curves; print(len(plot_curves([], 2, 'a run')))"
    sizes = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "MPLBACKEND": backend},
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for backend, folder in (
            ("module://matplotlib_inline.backend_inline", tmp_path),
            ("no such", tmp_path),
            ("", Path("/")),
        )
    ]
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        ('{"exit_reason": "finished", "steps": 7}', 7),
        ('{"exit_reason": "stopped at --steps", "steps": 7}', 7),
        ('{"exit_reason": "interrupted by SIGTERM", "steps": 7}', 0),
        ('{"exit_reason": "failed: x", "steps": 7}', 0),
        ('{"exit_reason": "finished"}', 0),
        ("[]", 0),
        ("{", 0),
        (None, 0),
    ],
)
def test_whether_a_run_came_to_its_end(run: RunDirectory, content: str | None, steps: int) -> None:
    if content is not None:
        run.summary.write_text(content)
    assert ended_after(run) == steps
