"""--log-samples: in a run that loses processes, each position of each epoch's plan is applied exactly once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from elastic_runs import RECIPE, STEPS, Fault, assert_each_once, events, with_faults
from real_runs import Start, finish

from hvd_lb.report.samples import SampleLog, samples_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "processes", "faults"),
    [
        ("torch", 2, [(1, "step", 5, "SIGKILL"), (0, "sums", 8, "SIGKILL")]),
        pytest.param(
            "horovod",
            3,
            [(2, "sums", 3, "SIGKILL"), (0, "log", 6, "SIGKILL"), (1, "step", 9, "SIGTERM")],
            marks=pytest.mark.long,
        ),
        pytest.param(
            "horovod", 3, [(1, "data", 1, "SIGKILL"), (0, "evaluation", 1, "SIGKILL")], marks=pytest.mark.long
        ),
    ],
)
def test_each_position_is_applied_once_whoever_is_lost(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    processes: int,
    faults: list[Fault],
) -> None:
    if engine == "horovod":
        pytest.importorskip("horovod")
    with_faults(tmp_path, monkeypatch, faults)
    run = tmp_path / "run"
    options = ("--elastic", "--min-processes", 2, "--engine", engine)
    finish(start(*RECIPE, "--processes", processes, *options, "--output", run))
    assert len([lost for change in events(run) for lost in change["lost"]]) >= 1
    assert_each_once(run, STEPS)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_started_again_counts_what_was_taken_last(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_faults(tmp_path, monkeypatch, [(0, "step", 6, "SIGKILL")])
    run = tmp_path / "run"
    recipe = (*RECIPE, "--processes", 2, "--engine", "torch", "--output", run)
    finish(start(*recipe), 1)
    monkeypatch.setenv("FAULTS", "[]")
    out, _ = finish(start(*recipe))
    assert "going on from step 4" in out
    assert_each_once(run, STEPS)


def test_what_was_given_up_or_taken_again_is_no_sample_of_the_run(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    a, b = SampleLog(logs, 0), SampleLog(logs, 1)
    for log, worker in ((a, 0), (b, 1)):
        log.given(0, {worker: [worker, 10 + worker]})
        log.taken(0)
    a.given(1, {0: [4]})  # process 1 is lost in this step
    a.given(1, {0: [5]})  # and a number did not fit: the same again
    b.given(1, {1: [6]})
    a.close()
    a = SampleLog(logs, 0, generation=1)
    a.given(1, {0: [5], 1: [6]})
    a.taken(1)
    with (logs / "samples-0000.jsonl").open("a") as file:
        file.write(json.dumps({"generation": 1, "taken": 2}))  # a line that came in half
    assert samples_of(tmp_path) == {0: {0: [[0, 10]], 1: [[1, 11]]}, 1: {0: [[5]], 1: [[6]]}}
    earlier = logs / "attempt-1"
    earlier.mkdir()
    for path in logs.glob("*.jsonl"):
        shutil.move(path, earlier)
    again = SampleLog(logs, 0)
    again.given(1, {0: [7]})
    again.taken(1)
    for log in (a, b, again):
        log.close()
    assert samples_of(tmp_path) == {0: {0: [[0, 10]], 1: [[1, 11]]}, 1: {0: [[7]]}}
