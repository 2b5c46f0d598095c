"""A sweep of real runs: killed, gone on with, interrupted."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import Start, finish, kill, processes_of, records, until

from hvd_lb.sweep.plan import open_sweep

pytestmark = pytest.mark.slow

WORDS = (
    *("--data", "digits", "--model", "resnet8", "--device", "cpu", "--threads", 1, "--together", 2),
    *("--epochs", 2, "--per-gpu-batch", 16, "--warmup", "none", "--vary", "gpus=2,4"),
)


@pytest.mark.long
def test_killed_and_gone_on_with(start: Start, hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    first = start("sweep", "run", folder, *WORDS)
    until((folder / "runs/gpus=2,seed=0/summary.json").exists)
    until((folder / "runs/gpus=4,seed=0/checkpoints/last").exists, every=0.02)
    kill([first.pid])
    first.wait()
    until(lambda: not processes_of(folder))  # what it had started has ended with it
    one, two = open_sweep(folder).points()
    ended = one.run.summary.stat().st_mtime_ns
    interrupted = not two.run.summary.exists()
    out, _ = finish(start("sweep", folder, "--jobs", 2))
    assert out.splitlines()[0].endswith("2 settings, 2 runs: 1 ended, 1 to go" if interrupted else "0 to go")
    assert one.run.summary.stat().st_mtime_ns == ended
    assert (two.run.logs / "attempt-1").is_dir() == interrupted
    for point in (one, two):
        assert json.loads(point.run.summary.read_text())["exit_reason"] == "finished"
    said = hvd_lb("sweep", "run", folder, *WORDS)
    assert (said.status, said.out) == (0, f"{folder}: 2 settings, 2 runs: 2 ended, 0 to go\n")
    last = records(two.run.path)[-1]
    found = json.loads(hvd_lb("evaluate", two.run.path, "--json", "--threads", 1).out)
    assert {name: found[name] for name in ("top1_error", "top5_error", "loss", "images")} == {
        name: last[name] for name in ("top1_error", "top5_error", "loss", "images")
    }


@pytest.mark.long
def test_interrupted_it_ends_its_runs_with_checkpoints(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    sweep = start("sweep", "run", folder, *WORDS, "--epochs", 500, "--jobs", 2)
    runs = [folder / "runs" / name for name in ("gpus=2,seed=0", "gpus=4,seed=0")]
    until(lambda: all((run / "checkpoints/last").exists() for run in runs))
    second = start("sweep", folder)
    _, err = finish(second, 2)
    assert "are being taken by another `hvd-lb sweep run`" in err
    sweep.send_signal(signal.SIGTERM)
    finish(sweep, 128 + signal.SIGTERM)
    assert not processes_of(folder)
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert summary["exit_reason"].startswith("interrupted")
        newest = max((run / "checkpoints").glob("step-*"))
        assert int(newest.name.removeprefix("step-")) == summary["steps"]


@pytest.mark.long
def test_a_run_that_diverges_is_a_result(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    words = (*WORDS[:-2], "--vary", "learning_rate=0.1,1e30")
    boards = tmp_path / "boards"
    out, _ = finish(start("sweep", "run", folder, *words, "--track", f"tensorboard:{boards}"))
    assert "learning_rate=1e+30,seed=0: diverged" in out
    assert {board.name for board in boards.iterdir()} == {point.name for point in open_sweep(folder).points()}
    out, _ = finish(start("sweep", folder))
    assert out.endswith("2 settings, 2 runs: 2 ended, 0 to go\n")


@pytest.mark.long
def test_by_train_on_several_processes(start: Start, tmp_path: Path) -> None:
    """The runs are those that are simulated, to the bit, averaged weights on and off among them."""
    words = (*WORDS[:-2], "--together", 1, "--reproducible", "--gpus", 2, "--steps", 4)
    words = (*words, "--vary", "ema=none,0.99")
    found = []
    for folder, more in ((tmp_path / "train", ("--train", "--processes", 2)), (tmp_path / "simulate", ())):
        finish(start("sweep", "run", folder, *words, *more))
        points = open_sweep(folder).points()
        assert [point.name for point in points] == ["ema=none,seed=0", "ema=0.99,seed=0"]
        environments = [json.loads(point.run.environment.read_text()) for point in points]
        assert [of["processes"] for of in environments] == [2 if more else 1] * 2
        ends = [[one for one in records(point.run.path) if one["kind"] == "eval"][-1] for point in points]
        assert ["ema_top1_error" in of for of in ends] == [False, True]
        found.append([{name: value for name, value in of.items() if name != "chain"} for of in ends])
    assert found[0] == found[1]
