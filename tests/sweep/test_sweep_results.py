"""Tables and figures of a sweep, counted by hand."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hvd_lb.recipe import Recipe
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.sweep.figure import as_png, minibatch_chart
from hvd_lb.sweep.plan import Grid, Sweep
from hvd_lb.sweep.results import error_of, how, results, unfinished

BASE = Recipe(data="digits", model="resnet8", image_size=8, per_gpu_batch=32, epochs=6, warmup_epochs=1)


def write(run: RunDirectory, errors: list[float], reason: str | None = "finished") -> None:
    """A run of two steps an epoch, evaluated after each."""
    run.logs.mkdir(parents=True)
    run.recipe.write_text("data: digits\n")
    lines = []
    for epoch, error in enumerate(errors):
        lines.append({"kind": "train", "epoch": epoch, "step": 2 * epoch, "loss": error / 10, "lr": 0.1})
        lines.append(
            {"kind": "eval", "epoch": epoch, "step": 2 * epoch + 1, "top1_error": error, "loss": 1.0}
        )
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if reason:
        run.summary.write_text(json.dumps({"exit_reason": reason, "steps": 2 * len(errors)}))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """gpus=2: 10 and 12; gpus=4: 11 and 11.5; gpus=8: one diverged, one not begun; gpus=16: 30 and one that runs."""
    of = Sweep(tmp_path / "s", BASE, "simulate", (Grid({"gpus": (2, 4, 8, 16)}, 2),))
    of.folder.mkdir()
    of.save()
    runs = {(point.recipe.gpus, point.recipe.seed): point.run for point in of.points()}
    write(runs[2, 0], [90, 50, 9, 11, 10, 10])  # the median of 50, 9, 11, 10, 10
    write(runs[2, 1], [90, 12, 13, 12, 11, 12.5])
    write(runs[4, 0], [90, 11, 11, 11, 11, 11])
    write(runs[4, 1], [90, 11.5, 11.5, 11.5, 11.5, 11.5])
    write(runs[8, 0], [90, 90], reason="failed: rank 0 on h failed: the loss is nan after step 4")
    told = {"rank": 0, "host": "h", "kind": "Diverged", "message": "the loss is nan", "time": 1.0}
    (runs[8, 0].logs / "error-0000.json").write_text(json.dumps(told))
    write(runs[16, 0], [30] * 6)
    write(runs[16, 1], [20, 20], reason=None)
    return of


def test_errors_are_counted_as_in_the_paper(sweep: Sweep) -> None:
    found = results(sweep)
    assert [(one.minibatch, one.errors, one.diverged) for one in found] == [
        (64, [10.0, 12.0], 0),
        (128, [11.0, 11.5], 0),
        (256, [], 1),
        (512, [30.0], 0),
    ]
    assert (found[0].mean, found[0].std) == (11.0, pytest.approx(2**0.5))
    assert [one.error() for one in found] == ["11.00 ± 1.41", "11.25 ± 0.35", "diverged", "30.00"]
    assert [one.learning_rate for one in found] == pytest.approx([0.025, 0.05, 0.1, 0.2])
    assert error_of(sweep.points()[0], epochs=1) == 10.0
    assert error_of(sweep.points()[0], epochs=4) == 10.0
    assert [point.name for point in unfinished(sweep.points())] == ["gpus=8,seed=1", "gpus=16,seed=1"]


def test_runs_that_ended_at_steps_go_on_where_there_are_more(
    hvd_lb: Callable[..., Any], tmp_path: Path
) -> None:
    """What they came to with fewer is no result of this sweep."""
    grids = (Grid({"gpus": (2, 4)}, 1),)
    short = Sweep(tmp_path / "s", BASE.model_copy(update={"steps": 4}), "simulate", grids)
    short.folder.mkdir()
    write(short.points()[0].run, [50, 40], reason="stopped at --steps")
    write(short.points()[1].run, [50, 40, 30, 20, 10, 5])
    for steps, left in ((4, 0), (6, 1), (None, 1)):
        longer = replace(short, base=BASE.model_copy(update={"steps": steps}))
        longer.save()
        assert len(unfinished(longer.points())) == left
        assert [len(one.errors) for one in results(longer)] == [1 - left, 1]
        told = hvd_lb("sweep", "status", short.folder).out
        assert ("gpus=2,seed=0  to go on" in told) == bool(left)


def test_tables(hvd_lb: Callable[..., Any], sweep: Sweep, tmp_path: Path) -> None:
    text = hvd_lb("sweep", "table", sweep.folder)
    assert (text.status, text.err) == (0, "")
    assert re.search(r"2 +64 +0\.025 +11\.00 ± 1\.41 +2 of 2 *\n", text.out)
    assert re.search(r"8 +256 +0\.1 +diverged +1 of 2, 1 diverged *\n", text.out)
    markdown = hvd_lb("sweep", "table", sweep.folder, "--format", "markdown").out.splitlines()
    assert markdown[:3] == [
        "| gpus | minibatch | scaled learning rate | top-1 error (%) | runs |",
        "| --- | --- | --- | --- | --- |",
        "| 2 | 64 | 0.025 | 11.00 ± 1.41 | 2 of 2 |",
    ]
    assert "median of the last 5 epochs" in markdown[-1]
    assert hvd_lb("sweep", "table", sweep.folder, "--output", tmp_path / "t.csv").status == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [row["mean_error"] for row in rows] == ["11.0", "11.25", "", "30.0"]
    assert [row["errors"] for row in rows] == ["10 12", "11 11.5", "", "30"]
    assert rows[2]["diverged"] == "1"
    assert hvd_lb("sweep", "table", sweep.folder, "--output", tmp_path / "t.html").status == 0
    assert "<td class=number>11.00 ± 1.41</td>" in (tmp_path / "t.html").read_text()
    wrong = hvd_lb("sweep", "table", sweep.folder, "--output", tmp_path / "t.xls")
    assert (wrong.status, wrong.out) == (2, "")


def test_settings_in_order_and_those_that_differ_in_a_field(
    hvd_lb: Callable[..., Any], sweep: Sweep, tmp_path: Path
) -> None:
    sweep = replace(sweep, grids=(*sweep.grids, Grid({"gpus": (4,), "warmup": ("none", "gradual")}, 1)))
    sweep = replace(sweep, grids=(*sweep.grids, Grid({"gpus": (1,)}, 1)))
    sweep.save()
    for point in sweep.points():
        if not point.run.metrics.exists():
            write(point.run, [20] * 6)

    def rows(*words: str) -> list[tuple[str, str]]:
        text = hvd_lb("sweep", "table", sweep.folder, "--format", "csv", *words).out
        return [(row["gpus"], row["warmup"]) for row in csv.DictReader(io.StringIO(text))]

    alone = [(gpus, "gradual") for gpus in ("1", "2", "4", "8", "16")]
    assert rows() == rows("--vary", "gpus", "--vary", "warmup") == [*alone, ("4", "none")]
    assert rows("--vary", "gpus") == alone
    assert "warmup" not in hvd_lb("sweep", "table", sweep.folder, "--vary", "gpus").out
    page = tmp_path / "figure.html"
    for words, lines in (([], 2), (["--vary", "gpus"], 1)):
        assert hvd_lb("sweep", "figure", sweep.folder, "--output", page, *words).status == 0
        (data,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)
        assert len(json.loads(data)[0]["series"]) == lines
    for words in (["table"], ["figure", "--output", page]):
        wrong = hvd_lb("sweep", *words[:1], sweep.folder, *words[1:], "--vary", "momentum")
        assert (wrong.status, wrong.err) == (2, "hvd-lb: error: --vary momentum is not varied here\n")


@pytest.mark.parametrize(
    ("ema", "said"),
    [
        ((None,), "Top-1 validation error in per cent"),
        ((None, 0.9), "Top-1 validation error of averaged weights where a run has them in per cent"),
        ((0.9,), "Top-1 validation error of averaged weights in per cent"),
    ],
)
def test_whose_errors_are_counted_is_said(tmp_path: Path, ema: tuple[float | None, ...], said: str) -> None:
    of = Sweep(tmp_path / "s", BASE, "simulate", (Grid({"ema": ema}, 1),))
    assert how(of).startswith(f"{said}: ")
    write(of.points()[0].run, [10.0])
    chart, _ = minibatch_chart(of, results(of))
    assert (
        chart.y_label
        == f"top-1{said.removeprefix('Top-1 validation').removesuffix(' in per cent')}, validation (%)"
    )


@pytest.mark.parametrize(
    ("epochs", "every", "said"),
    [
        (1, "1epoch", "that of the last epoch"),
        (3, "1epoch", "median of the last 3 epochs"),
        (9, "2epochs", "median of the last 5 evaluated epochs"),
    ],
)
def test_of_a_short_run_no_more_epochs_are_told(
    hvd_lb: Callable[..., Any], tmp_path: Path, epochs: int, every: str, said: str
) -> None:
    short = BASE.model_copy(update={"epochs": epochs, "eval_every": every})
    of = Sweep(tmp_path / "s", short, "simulate", (Grid({"gpus": (2,)}, 1),))
    of.folder.mkdir()
    of.save()
    write(of.points()[0].run, [10.0] * epochs)
    assert f"top-1 error 10.00 % ({said})" in hvd_lb("sweep", "status", of.folder).out
    assert f"of each run {'the ' * (epochs > 1)}{said}," in how(of)


def test_status(hvd_lb: Callable[..., Any], sweep: Sweep) -> None:
    lines = hvd_lb("sweep", "status", sweep.folder).out.splitlines()
    assert lines[0] == "gpus=2,seed=0  finished, top-1 error 10.00 % (median of the last 5 epochs)"
    assert lines[2].startswith("gpus=8,seed=0  diverged: ")
    assert lines[6] == "gpus=8,seed=1  not begun"
    assert lines[-1].startswith("8 runs: 5 finished, ")
    told = json.loads(hvd_lb("sweep", "status", sweep.folder, "--json").out)
    assert [one["state"] for one in told].count("diverged") == 1
    assert told[0]["top1_error"] == 10.0


def test_figure_1(hvd_lb: Callable[..., Any], sweep: Sweep, tmp_path: Path) -> None:
    chart, sentence = minibatch_chart(sweep, results(sweep))
    (line,) = chart.series
    assert (line.x, line.y) == ([64, 128, 256, 512], [11.0, 11.25, None, 30.0])
    assert line.low
    assert line.high
    assert (line.low[0], line.high[1]) == pytest.approx((11 - 2 * 2**0.5, 11.25 + 2 * 0.125**0.5))
    assert [(mark.x, mark.text) for mark in chart.marks] == [(256, "1 of 2 runs diverged")]
    assert sentence.endswith("(11.00 + 2 × 1.41 %): 128 images.")
    png = tmp_path / "figure.png"
    said = hvd_lb("sweep", "figure", sweep.folder, "--output", png)
    assert (said.status, said.err, said.out) == (0, "", f"{sentence}\nwritten: {png}\n")
    with Image.open(png) as picture:
        assert picture.size == (880, 506)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    named = hvd_lb("sweep", "figure", sweep.folder, "--output", png, "--baseline", "gpus=4")
    assert "that of 128 images" in named.out
    page = tmp_path / "figure.html"
    assert hvd_lb("sweep", "figure", sweep.folder, "--output", page).status == 0
    (data,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)
    (drawn,) = json.loads(data)
    assert drawn["series"][0]["y"] == [11.0, 11.25, None, 30.0]
    assert drawn["series"][0]["low"][2] is drawn["series"][0]["high"][2] is None


def test_settings_of_which_runs_are_missing_are_told(sweep: Sweep) -> None:
    (run,) = (point.run for point in sweep.points() if (point.recipe.gpus, point.recipe.seed) == (4, 1))
    run.summary.unlink()
    _, sentence = minibatch_chart(sweep, results(sweep))
    assert sentence.endswith("128 images (so far 1 of 2 runs of 128 images).")


@pytest.mark.parametrize(
    ("state", "reached"),
    [
        ("ended", "512 images (so far 1 of 2 runs of 256 images)"),
        ("diverged", "128 images"),
        ("not begun", "128 images"),
    ],
)
def test_what_comes_after_a_setting_that_diverged_or_is_not_known_is_not_reached(
    sweep: Sweep, state: str, reached: str
) -> None:
    """512 images are as good as the baseline; that 256 are not in between ends what is within its noise."""
    found = results(sweep)
    found[2] = replace(
        found[2], errors=[11.0] if state == "ended" else [], diverged=2 if state == "diverged" else 0
    )
    found[3] = replace(found[3], errors=[11.0, 11.5])
    chart, sentence = minibatch_chart(sweep, found)
    assert sentence.endswith(f"%): {reached}.")
    assert chart.series[0].x == [64, 128, *([] if state == "not begun" else [256]), 512]
    assert len(chart.marks) == (state == "diverged")
    assert len(as_png([chart], sentence)) > 1000
    # Where the baseline's own seeds diverge now and then nothing is within its noise.
    found[0] = replace(found[0], diverged=1)
    assert minibatch_chart(sweep, found)[1].endswith("%): none.")


def test_figure_2(hvd_lb: Callable[..., Any], sweep: Sweep, tmp_path: Path) -> None:
    page = tmp_path / "curves.html"
    words = ("--curves", "gpus=2", "--curves", "gpus=16")
    assert hvd_lb("sweep", "figure", sweep.folder, "--output", page, *words).status == 0
    (data,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)
    error, loss = json.loads(data)
    assert [series["name"] for series in error["series"]] == ["gpus=2", "gpus=16"]
    assert error["series"][0]["y"] == [90.0, 31.0, 11.0, 11.5, 10.5, 11.25]
    assert error["series"][0]["low"] == [90, 12, 9, 11, 10, 10]
    assert error["series"][1]["x"] == [1, 2, 3, 4, 5, 6]  # of the run that has ended
    assert error["series"][1]["y"] == [30] * 6
    assert loss["series"][0]["y"][0] == 9.0
    wrong = hvd_lb("sweep", "figure", sweep.folder, "--output", page, *words, "--baseline", "gpus=2")
    assert wrong.status == 2
    early = Sweep(tmp_path / "early", BASE, "simulate", (Grid({"gpus": (2,)}, 1),))
    early.folder.mkdir()
    early.save()
    said = hvd_lb("sweep", "figure", early.folder, "--output", page)
    assert (said.status, said.out) == (2, "")
    assert "no run has come so far" in said.err
