"""The page of runs: it says what it should, whatever the runs hold, and needs nothing from elsewhere."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.recipe import Recipe
from hvd_lb.report.page.chart import Series, thinned
from hvd_lb.report.page.events import events
from hvd_lb.report.page.runs import runs_page
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.watch.state import look


def make_run(path: Path, **fields: Any) -> RunDirectory:
    """20 steps in 2 epochs: stopped once, gone on with by more processes, and with a stand-in."""
    run = RunDirectory(path)
    (run.logs / "attempt-1").mkdir(parents=True)
    run.recipe.write_text(Recipe(data="digits", model="resnet8", **fields).to_yaml())
    run.environment.write_text(json.dumps({"processes": 2, "versions": {"torch": "2.14.1"}}))
    lines: list[dict[str, Any]] = [
        {
            "kind": "train",
            "epoch": step // 10,
            "step": step,
            "lr": 0.1,
            "loss": 2.0,
            "images_per_second": 100.0,
            # Older versions told neither.
            **({"gradient_norm": 3.0 + step, "peak_memory_gb": 1.5} if step >= 10 else {}),
        }
        for step in (*range(8), *range(5, 20))
    ]
    lines[3:3] = [{"kind": "warning", "epoch": 0, "step": 3, "message": "the disk is </script><b>full</b>"}]
    lines[:0] = [{"kind": "begin", "step": -1, "recipe": {}}, {"kind": "digest", "epoch": 0, "step": 0}]
    lines[11:11] = [{"kind": "rollback", "step": 7, "to": 5, "left_out": True}]
    change = {"kind": "generation", "step": 14, "to": 15, "before": 3, "processes": 2}
    lines.insert(next(at for at, line in enumerate(lines) if line["step"] == 15), change)
    lines += [
        {"kind": "noise", "epoch": 1, "step": 15, "noise_scale": 900.0, "low": 500.0, "high": 4000.0},
        {"kind": "noise", "epoch": 1, "step": 16, "noise_scale": None, "low": 500.0, "high": None},
        {
            "kind": "eval",
            "epoch": 1,
            "step": 19,
            "top1_error": 12.345,
            "top5_error": 1.0,
            "loss": 0.5,
            "images": 359,
        },
    ]
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run.summary.write_text(
        json.dumps(
            {"exit_reason": "finished", "steps": 20, "total_steps": 20, "epochs": 2, "wall_seconds": 61}
        )
    )
    bad = [{"kind": "bad_image", "epoch": 1, "step": 12, "of": "train"}] * 2
    run.bad_images.write_text("".join(f"{json.dumps(line)}\n" for line in bad))
    first, then = {"processes": 2, "checkpoint": None}, {"processes": 3, "checkpoint": "c/step-00000008"}
    (run.logs / "attempt-1" / "job.json").write_text(json.dumps(first))
    (run.logs / "attempt-1" / "stopped.json").write_text(json.dumps({"steps": 8, "signal": 2}))
    (run.logs / "job.json").write_text(json.dumps(then))
    return run


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return {chart["key"]: chart for chart in json.loads(text)}


def test_events_are_told_in_their_order(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(event.step, event.kind, event.text) for event in events(run, records)] == [
        (3, "warning", "the disk is </script><b>full</b>"),
        (7, "rollback", "went back to step 5, and left step 7 out"),
        (8, "stop", "stopped after 8 steps, with a checkpoint"),
        (8, "resume", "went on at step 8, 2 → 3 processes"),
        (12, "stand-in", "epoch 1: 2 images that could not be decoded, others stood in"),
        (14, "generation", "2 processes go on, before 3 (an exchange failed)"),
    ]


def test_the_page_of_one_run(tmp_path: Path) -> None:
    page = runs_page([make_run(tmp_path / "a").path])
    charts = data_of(page)
    assert list(charts) == ["error", "loss", "rate", "norm", "noise", "speed", "memory"]
    assert charts["norm"]["series"][0]["y"] == [3.0 + step for step in range(10, 20)]
    assert charts["memory"]["y_label"] == "GB"
    assert charts["error"]["series"][0]["name"] == "top-1"
    assert (charts["error"]["series"][0]["x"], charts["error"]["series"][0]["y"]) == ([2.0], [12.345])
    assert charts["noise"]["series"][0]["high"] == [4000.0]
    assert len(charts["loss"]["series"][0]["x"]) == 20
    assert [mark["x"] for mark in charts["loss"]["marks"]] == [0.3, 0.7, 0.8, 0.8, 1.2, 1.4]
    assert "<b>full" not in page
    assert "</script>&lt;" not in page
    for text in ("12.35 %", "20 of 20", "finished", "100 images/s (median)", "1 min 1 s", "stood in"):
        assert text in page, text
    assert "Differences" not in page
    # Nothing is fetched from elsewhere.
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "https://" not in page
    assert re.findall(r"http://[^\"' ]*", page) == ["http://www.w3.org/2000/svg"]


def test_runs_are_laid_over_each_other_and_differ_in(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", gpus=4, seed=1)
    page = runs_page([tmp_path / "a", tmp_path / "b"], title="two <runs>")
    assert "two &lt;runs&gt;" in page
    differences = page[page.index("Differences") : page.index("Events")]
    assert re.findall(r"<td>recipe: (\w+)</td><td>(\d+)</td><td>(\d+)</td>", differences) == [
        ("gpus", "1", "4"),
        ("seed", "0", "1"),
    ]
    names = [series["name"] for series in data_of(page)["loss"]["series"]]
    assert names == ["a · training", "a · validation", "b · training", "b · validation"]


def test_errors_of_averaged_weights_are_told_and_judge_the_run(tmp_path: Path) -> None:
    """As in summary.json; raw weights and averaged ones are told apart, also where a run beside has none."""
    run, plain = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    earlier, later = (
        {"top1_error": 40.0, "ema_top1_error": 33.25, "ema_top5_error": 3.5},
        {"top1_error": 31.0, "ema_top1_error": 35.75, "ema_top5_error": 4.5},
    )
    common = {"kind": "eval", "epoch": 1, "top5_error": 5.0, "loss": 0.5, "images": 359}
    lines = [{**common, "step": 9, **earlier}, {**common, "step": 19, **later}]
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    alone = runs_page([run.path])
    assert "<td>31.00 %, 35.75 % of averaged weights</td>" in alone
    assert "<td>5.00 %, 4.50 % of averaged weights</td>" in alone
    assert "<th>best top-1 error</th><td>33.25 % of averaged weights</td>" in alone
    assert "top-1 error, averaged weights (%)" in alone
    for row in ("40.00 5.00 33.25 3.50", "31.00 5.00 35.75 4.50"):
        assert "".join(f"<td class=number>{cell}</td>" for cell in row.split()) in alone
    both = runs_page([run.path, plain.path])
    assert "".join(f"<td class=number>{cell}</td>" for cell in ("12.35", "1.00", "", "")) in both
    assert "averaged" not in runs_page([plain.path])


def test_a_long_line_keeps_its_peaks() -> None:
    values = [float(i % 7) for i in range(100_000)]
    values[54_321], values[77_777] = 1000.0, -1000.0
    short = thinned(Series("a", list(range(100_000)), [None, *values[1:]]), most=400)
    assert len(short.x) <= 400
    assert (54_321, 1000.0) in zip(short.x, short.y, strict=True)
    assert (77_777, -1000.0) in zip(short.x, short.y, strict=True)
    assert list(short.x) == sorted(short.x)


def test_the_command(hvd_lb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", gpus=4)
    said = hvd_lb("report", a.path)
    assert (said.status, said.err, said.out) == (0, "", f"1 run: {a.report}\n")
    assert "12.35 %" in a.report.read_text()
    monkeypatch.chdir(tmp_path)
    assert hvd_lb("report", "a", "b", "--watch").out == "2 runs: report.html\n"  # both have ended
    assert b.path.name in (tmp_path / "report.html").read_text()
    a.recipe.write_text("gpus: [\n")
    said = hvd_lb("report", a.path)
    assert (said.status, said.out) == (0, f"1 run: {a.report}\n")
    assert said.err == f"warning: {a.recipe} cannot be read: the page is without it\n"
    for words, wrong in (
        ((tmp_path,), "holds no run"),
        ((tmp_path / "none",), "none does not exist: expected a run directory"),
        ((a.path, "--output", "a.pdf"), "expected a name that ends in .html"),
        ((a.path, "--output", "none/a.html"), "none/a.html cannot be written"),
    ):
        refused = hvd_lb("report", *words)
        assert (refused.status, refused.out) == (2, "")
        assert wrong in refused.err


@pytest.mark.parametrize("wrong", ["twelve", [], {"a": 1}], ids=str)
def test_fields_of_another_kind_are_left_out(tmp_path: Path, wrong: object) -> None:
    """Somebody has edited the files that tell of a run."""
    run = make_run(tmp_path / "run")
    names = (
        "exit_reason",
        "steps",
        "total_steps",
        "epochs",
        "wall_seconds",
        "images_per_second",
        "data_wait",
    )
    for file in (run.summary, run.environment, run.launching, run.heartbeat, run.stopped, run.job):
        names = (
            *names,
            "versions",
            "command",
            "hosts",
            "processes",
            "steps_per_epoch",
            "global_batch",
            "step",
        )
        file.write_text(json.dumps(dict.fromkeys(names, wrong)))
    assert "</html>" in runs_page([run.path])
    assert look([run.path])[0].state
