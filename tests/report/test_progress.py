"""What is shown of a run that goes on: a display ends nothing, whatever it reads."""

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hvd_lb.report import progress
from hvd_lb.report.progress import RunView, open_display, together_line
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.report.text import audit_in_words
from hvd_lb_cli.output.terminal import plain_console

RECORDS = [
    {
        "kind": "train",
        "epoch": 0,
        "step": 0,
        "lr": 0.1,
        "loss": None,
        "images_per_second": None,
        "data_wait": None,
    },
    {"kind": "train", "step": 1},
    {"kind": "eval", "step": 1},
    {"kind": "eval", "step": 1, "epoch": 0, "top1_error": 1, "top5_error": None, "loss": None, "images": 10},
    {"kind": "repeat", "step": 1},
    {"kind": "together", "step": 1},
    {"kind": "together", "step": 1, "together": [], "images_per_second": {"1": "x", "2": None}, "why": 0},
    {"kind": "together", "step": 1, "images_per_second": 3},
    {"kind": "rollback", "step": 1},
    {"kind": "rollback", "step": 1, "to": 0},
    {"kind": "rollback", "step": 1, "to": 0, "left_out": True, "images": [1, 2]},
    {"kind": "rescale", "step": 1},
    {"kind": "rescale", "step": 1, "workers": 2, "steps_per_epoch": None},
    {
        "kind": "rescale",
        "step": 1,
        "epoch": 0,
        "images": 4,
        "workers": 2,
        "before": 4,
        "global_batch": 2,
        "lr": 0.1,
        "full_lr": 0.2,
        "steps_per_epoch": 8,
        "offset": -1,
        "total_steps": 7,
    },
    {"kind": "warning", "step": 1, "message": "the disk [bold]is[/] full"},
    {"kind": 3, "step": 1},
    {"step": 1},
]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.logs.mkdir()
    return run


def view(run: RunDirectory, console: Console) -> RunView:
    display = open_display(console, first_step=0, total_steps=4, steps_per_epoch=4)
    return RunView(run, display, 0)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_null_and_foreign_records_are_shown_or_left_out(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, terminal: bool, encoding: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run.metrics.write_text("\n".join(["not JSON", *map(json.dumps, RECORDS)]) + "\n")
    run.bad_images.write_text('{"step": 0}\n')
    run.heartbeat.write_text('{"step": 1, "microbatch": 1, "microbatches": 2}')
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    console = plain_console()
    console.file = shown
    console._force_terminal = terminal
    with view(run, console) as watching:
        watching.update()
    shown.seek(0)
    text = shown.read()
    assert "evaluation: top-1 error 1.00 %, top-5 error nan %, loss nan, 10 images" in text
    assert "the disk [bold]is[/] full" in text
    assert "epoch 0 step 1: 2 virtual workers from here on, before 4: minibatches of 2 images" in text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"step": "x", "microbatch": 1, "microbatches": 2}']
)
def test_half_a_sign_of_life(run: RunDirectory, text: str) -> None:
    run.heartbeat.write_text(text)
    view(run, Console(file=io.StringIO())).update()


def test_a_sign_of_life_of_no_microbatches(run: RunDirectory) -> None:
    run.heartbeat.write_text('{"step": 1, "microbatch": 0, "microbatches": 0}')
    view(run, Console(file=io.StringIO(), force_terminal=True)).update()


@pytest.mark.parametrize("terminal", [False, True])
def test_how_far_an_evaluation_is(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """Also after the last step, and on pipes where nothing was said for a minute."""
    monkeypatch.setenv("TERM", "xterm")
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = io.StringIO()
    watching = view(run, Console(file=shown, force_terminal=terminal, width=120))
    records = [{**RECORDS[3], "kind": "train", "step": step} for step in range(4)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    watching.update()
    for share in (25, 50):
        now += 61.0
        run.heartbeat.write_text(
            json.dumps({"step": 3, "microbatch": share, "microbatches": 100, "doing": "evaluation"})
        )
        watching.update()
    watching._display.close()
    text = shown.getvalue()
    if terminal:
        assert "epoch 0 step 3 evaluation, 50 % done" in text
    else:
        assert text.splitlines()[-2:] == [f"step 3/4: evaluation, {share} % done" for share in (25, 50)]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_images.jsonl", "progress.json"])
def test_what_cannot_be_read_just_now_is_left_out(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    watching = view(run, console)
    run.metrics.write_text(json.dumps(RECORDS[3]) + "\n")
    run.bad_images.write_text('{"step": 0, "path": "a.jpg"}\n')
    run.heartbeat.write_text('{"step": 1, "microbatch": 1, "microbatches": 2}')
    with monkeypatch.context() as broken:
        original = io.open

        def opened(path: Any, *more: Any, **named: Any) -> Any:
            if os.fspath(path).endswith(name):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return original(path, *more, **named)

        broken.setattr(io, "open", opened)
        watching.update()
    watching.update()
    assert "evaluation: top-1 error 1.00 %" in shown.getvalue()
    assert "a.jpg cannot be decoded" in shown.getvalue()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"together": 4, "images_per_second": {"1": 540.2, "4": 812.0}, "why": ""},
            "from step 9 on 4 virtual workers of a process are computed together, which is fastest "
            "(1: 540 images/s, 4: 812 images/s)",
        ),
        (
            {"together": 1, "images_per_second": {"1": 812.0, "2": 540.2}, "why": ""},
            "from step 9 on virtual workers are computed one by one, which is fastest "
            "(1: 812 images/s, 2: 540 images/s)",
        ),
        (
            {"together": 1, "images_per_second": {}, "why": "its module 1 mixes images"},
            "virtual workers are computed one by one: its module 1 mixes images",
        ),
    ],
)
def test_how_many_are_computed_together(record: dict[str, Any], expected: str) -> None:
    assert together_line({"kind": "together", "step": 8, **record}) == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "rank 1 and rank 2 computed"),
        ({"hosts": ["h1", "h2"]}, "rank 1 on h1 and rank 2 on h2 computed"),
        (
            {"hosts": ["h1", "h2"], "gpus": ["GPU 1 (0000:1a:00.0)", "GPU 0"]},
            "rank 1 on h1, GPU 1 (0000:1a:00.0), and rank 2 on h2, GPU 0, computed",
        ),
    ],
)
def test_who_was_wrong_and_where(known: dict[str, list[str]], expected: str) -> None:
    said = audit_in_words({"liars": [1, 2], "workers": [3], **known})
    assert said == f"{expected} virtual worker 3 wrongly (--audit); the step is taken again"
