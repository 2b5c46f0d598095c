"""What a run directory tells of its run: also of processes on other machines, by other clocks and after reboots."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.errors import UserError
from hvd_lb.machine.process import this_process
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.watch import state as states
from hvd_lb.watch.state import find_runs, look
from hvd_lb_cli.watch.words import one_line, rows

FACTS = {
    "processes": 2,
    "hosts": ["h1"],
    "since": 1.7e9,
    "total_steps": 100,
    "steps_per_epoch": 20,
    "global_batch": 64,
}
ELSEWHERE = {"host": "h2", "machine": "another boot", "pid": 7, "started": 1}
TRAIN = {"kind": "train", "epoch": 0, "step": 9, "images_per_second": 128.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "a [b] run \udcff")
    run.logs.mkdir(parents=True)
    run.recipe.write_text("{}\n")
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(states, "_LOOK_SECONDS", 0.02)


def launched(run: RunDirectory, process: dict[str, Any] | None = None) -> None:
    run.launching.write_text(json.dumps({**(process or this_process()), **FACTS}))


def ends(run: RunDirectory, reason: str) -> None:
    run.summary.write_text(
        json.dumps({"exit_reason": reason, "steps": 40, "total_steps": 100, "epochs": 2.0})
    )


def state(run: RunDirectory) -> states.RunState:
    return look([run.path])[0]


def test_a_run_at_work(run: RunDirectory) -> None:
    launched(run)
    assert (state(run).state, state(run).reason) == ("running", "starting processes")
    run.heartbeat.write_text('{"step": 12, "microbatch": 1, "microbatches": 2}')
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in (TRAIN, {"step": 1, "kind": "x"})))
    now = state(run)
    assert (now.state, now.steps, now.total_steps, now.epochs) == ("running", 12, 100, 0.6)
    assert (now.images_per_second, now.seconds_left) == (128.0, 44.0)
    assert (now.launched_on, now.pid) == (this_process()["host"], os.getpid())
    assert now.doing is None
    run.heartbeat.write_text('{"step": 12, "microbatch": 3, "microbatches": 4, "doing": "evaluation"}')
    assert (state(run).steps, state(run).doing) == (13, {"what": "evaluation", "share": 0.75})
    assert ("now", "evaluation, 75 % done") in rows(state(run))
    assert "evaluation 75 %" in one_line(state(run), 10)
    run.heartbeat.write_text('{"step": 12, "microbatch": 3, "microbatches": 0, "doing": []}')
    assert state(run).doing is None
    run.stop.write_text("2")
    assert state(run).state == "stopping"


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("finished", "finished"),
        ("stopped at --steps", "finished"),
        ("interrupted by SIGTERM", "interrupted"),
        ("failed: rank 1 on h2 failed: a reason", "failed"),
    ],
)
@pytest.mark.parametrize("drawing", [True, False])
def test_a_run_that_has_ended(run: RunDirectory, reason: str, word: str, drawing: bool) -> None:
    """Also while its launching process still draws its curves."""
    ends(run, reason)
    run.stop.write_text("2")
    if drawing:
        launched(run)
    now = state(run)
    assert (now.state, now.reason, now.steps, now.epochs) == (word, reason, 40, 2.0)


def test_one_whose_process_is_no_more_is_lost(run: RunDirectory) -> None:
    launched(run, {**this_process(), "started": 1})
    assert state(run).state == "lost"
    assert (
        state(run).reason
        == f"its launching process, process {os.getpid()} on {this_process()['host']}, is gone without a word"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x"}', '{"pid": 1, "host": 1}'])
def test_a_damaged_record_is_none(run: RunDirectory, content: str) -> None:
    run.launching.write_text(content)
    assert state(run).state == "unknown"


def test_of_an_older_version_nothing_is_known(run: RunDirectory) -> None:
    assert state(run).state == "unknown"


@pytest.mark.parametrize(
    "hours", [0, -5, 5], ids=["same clock", "their clock is behind", "their clock is ahead"]
)
@pytest.mark.parametrize("alive", [True, False])
def test_on_another_machine_signs_of_life_decide_and_no_clock(
    run: RunDirectory, hours: int, alive: bool
) -> None:
    """A reboot makes another machine of this one."""
    launched(run, {**this_process(), "machine": "before the reboot"})
    there = time.time() - 60 + 3600 * hours
    os.utime(run.launching, (there, there))

    def beat() -> None:
        time.sleep(0.2)
        os.utime(run.launching, (there + 5, there + 5))

    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
    assert state(run).state == ("running" if alive else "lost")
    if alive:
        thread.join()


def test_a_fresh_sign_of_life_needs_no_second(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(run, ELSEWHERE)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    assert state(run).state == "running"


def test_many_that_are_silent_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_PATIENCE_SECONDS", 0.2)
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setattr(time, "monotonic", lambda: 0.05 * len(naps))
    for number in range(20):
        run = RunDirectory(tmp_path / str(number))
        run.logs.mkdir(parents=True)
        launched(run, ELSEWHERE)
        os.utime(run.launching, (1, 1))
    assert {one.state for one in look([tmp_path / str(number) for number in range(20)])} == {"lost"}
    assert len(naps) == 4


def test_errors_are_told_in_the_order_they_came(run: RunDirectory) -> None:
    for rank, when in ((0, 2.0), (3, 1.0)):
        error = {"rank": rank, "host": "h1", "time": when, "kind": "ValueError", "message": f"m{rank}"}
        run.error(rank).write_text(json.dumps(error))
    run.error(5).write_text("{")
    assert state(run).errors == ["rank 3 on h1: ValueError: m3", "rank 0 on h1: ValueError: m0"]


def test_an_evaluation_far_back_in_a_large_file_is_found(run: RunDirectory) -> None:
    evaluation = {
        "kind": "eval",
        "epoch": 0,
        "step": 5,
        "top1_error": 50.0,
        "top5_error": 1.0,
        "loss": 1.0,
        "images": 3,
    }
    lines = [json.dumps(evaluation)] + [json.dumps({**TRAIN, "step": step}) for step in range(6, 6006)]
    run.metrics.write_text("\n".join(lines) + "\n")
    assert run.metrics.stat().st_size > 1 << 18
    launched(run)
    assert state(run).evaluation == evaluation
    assert state(run).steps == 6006


def test_the_slowest_rank_is_told(run: RunDirectory) -> None:
    launched(run)
    ranks = {"kind": "ranks", "epoch": 0, "step": 9, "median": 1.0, "slowest": 1, "slower": 1.8, "host": "h2"}
    run.metrics.write_text(json.dumps({**ranks, "reason": "data", "data": [0.0, 1.0]}) + "\n")
    assert state(run).slowest == {"rank": 1, "host": "h2", "slower": 1.8, "reason": "data"}


def test_runs_are_found_below_a_folder_and_through_links(tmp_path: Path, make: Callable[..., Path]) -> None:
    scratch = make("scratch/far/x")
    runs = [make("runs/b"), make("runs/a"), make("runs/sweep/lr-1/c")]
    make("runs/a/checkpoints/none")  # in a run there is none
    make("runs/.hidden/d")
    (tmp_path / "runs" / "link").symlink_to(scratch.parent)
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs" / "sweep")
    (tmp_path / "runs" / "sweep" / "up").symlink_to(tmp_path / "runs" / "sweep")
    (tmp_path / "runs" / "file").write_text("")
    found = find_runs(tmp_path / "runs")
    assert {path.resolve() for path in found} == {scratch, *runs}
    assert find_runs(runs[0]) == [runs[0]]
    with pytest.raises(UserError, match="is no folder"):
        find_runs(tmp_path / "nowhere")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def one(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text("{}\n")
        return path

    return one
