"""Records: strict JSON in whole lines, also on a full disk; and readers that cope with what others left."""

import errno
import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from full_disk import room

from hvd_lb.launch.rank.elastic import told_again
from hvd_lb.report.metrics import (
    Epochs,
    JsonLines,
    MetricsFollower,
    RunObserver,
    last_records,
    read_metrics,
    read_records,
    truncate_metrics,
)
from hvd_lb.report.run_directory import RunDirectory, replace_text

NAN, INF = float("nan"), float("inf")
TORN = b'{"kind": "train", "step": 3, "lo'
FOREIGN = [
    b'{"kind": [], "step": 1}\n',
    b"\0\0\0\0\n",
    b"not JSON\n",
    b"[1]\n",
    b"3\n",
    b'{"kind": "train"}\n',
    b'{"kind": "train", "step": 1, "loss": "0.5"}\n',
    b'{"kind": "eval", "step": 1, "top1_error": [1]}\n',
    b"[" * 100_000 + b"\n",
    b'"\xff"\n',
    b"\n",
    TORN + b"\n",
]


def train(step: int, **more: Any) -> dict[str, Any]:
    return {
        "epoch": 0,
        "step": step,
        "lr": 0.1,
        "loss": 2.5,
        "images_per_second": 10.0,
        "data_wait": 0.0,
        **more,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file, read by the letter of the standard."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text("ascii")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.logs.mkdir()
    return run


def test_what_is_not_finite_is_null(run: RunDirectory) -> None:
    observer = RunObserver(run, 0)
    observer.train(train(0, loss=NAN, lr=INF, deep=[1.0, {"x": -INF}]))
    observer.close()
    [record] = lines(run.metrics)
    assert (record["loss"], record["lr"], record["deep"]) == (None, None, [1.0, {"x": None}])
    assert read_metrics(run.metrics) == [record]


def test_the_thread_imports_no_library(run: RunDirectory) -> None:
    """Two threads that import TensorBoard and DALI at one time may not find `six.moves`, and a rank fails."""
    program = f"""
import sys
from pathlib import Path
from hvd_lb.report.metrics import RunObserver
from hvd_lb.report.run_directory import RunDirectory
observer = RunObserver(RunDirectory(Path({str(run.path)!r})), 0)
before = set(sys.modules)
observer.train({train(0)!r})
observer.close()
print({{name.partition(".")[0] for name in set(sys.modules) - before}} & {{"six", "tensorboard", "google", "torch"}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert list(run.tensorboard.iterdir())


@pytest.mark.parametrize("foreign", FOREIGN)
def test_one_line_that_is_no_record_is_left_out(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"kind": "train", **train(step)}).encode() + b"\n" for step in range(3)]
    path.write_bytes(whole[0] + foreign + whole[1] + whole[2] + TORN)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]
    assert read_records(path)[1] == 1
    assert [record["step"] for record in MetricsFollower(path, 1).new_records()] == [1, 2]
    truncate_metrics(path, 2)
    assert path.read_bytes() == whole[0] + whole[1]


def test_a_kind_that_is_not_known_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "later", "why": "x"}\n{"step": 2, "kind": 7}\n')
    before = path.stat().st_ino
    truncate_metrics(path, 5)
    assert path.stat().st_ino == before  # nothing to change
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1, "kind": "later", "why": "x"}\n'


def test_a_rollback_counts_for_a_run_that_goes_on_after_it(tmp_path: Path) -> None:
    """It voids what was told of steps 2 and 3 before, and says what was left out, though that was step 3."""
    path = tmp_path / "metrics.jsonl"
    rollback = {"kind": "rollback", "epoch": 0, "step": 3, "to": 2, "left_out": True, "images": [1]}
    told = [{"kind": "train", **train(step, loss=1.0)} for step in range(4)]
    again = [{"kind": "train", **train(step, loss=2.0)} for step in (2, 4)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in (*told, rollback, *again)))
    truncate_metrics(path, 3)
    assert read_metrics(path) == [*told[:2], rollback, again[0]]
    assert MetricsFollower(path, 3).new_records() == []
    assert rollback in MetricsFollower(path, 2).new_records()
    truncate_metrics(path, 2)
    assert read_metrics(path) == told[:2]


def test_another_generation_tells_again_what_it_takes_again(tmp_path: Path) -> None:
    """And, where that was not done when the others were lost, what was kept and evaluated after the step before."""
    file = JsonLines(tmp_path / "metrics.jsonl")
    before = [{"kind": kind, "step": 4} for kind in ("train", "checkpoint", "eval")]
    change = {"kind": "generation", "step": 5, "to": 5, "redone": True}
    file.add(*before, {"kind": "recovered", "step": 5}, {"kind": "train", "step": 5}, change)
    file.write()
    records = read_metrics(file.path)
    assert records == [before[0], {"kind": "recovered", "step": 5}, change]
    file.add({**change, "to": 4, "redone": False})
    file.write()
    assert [record["kind"] for record in read_metrics(file.path)] == ["recovered", "generation", "generation"]
    truncate_metrics(file.path, 4)
    assert read_metrics(file.path) == []


@pytest.mark.parametrize("untold", [False, True])
def test_what_came_after_earlier_steps_is_not_taken_back(tmp_path: Path, untold: bool) -> None:
    """Three steps are done; what follows the last one is not, and perhaps its losses are not told either."""
    file = JsonLines(tmp_path / "metrics.jsonl")
    kept = [{"kind": kind, "step": 1} for kind in ("train", "digest", "checkpoint", "eval")]
    last = {"kind": "train", "step": 2}
    redone = {"kind": "digest", "step": 2}
    to, also_after = told_again(3, unfinished=True, untold=untold)
    change = {"kind": "generation", "step": 3, "to": to, "redone": also_after}
    file.add(*kept, last, redone, change)
    file.write()
    assert read_metrics(file.path) == [*kept, *([] if untold else [last]), change]


def test_numbers_of_older_versions_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "train", **train(0, loss=NAN, lr=INF)}) + "\n")
    [record] = read_metrics(path)
    assert record["loss"] is record["lr"] is None


def test_a_follower_goes_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path, 0)
    assert follower.new_records() == []
    path.write_text('{"step": 0}\n{"st')
    assert follower.new_records() == [{"step": 0}]
    original = Path.open

    def stale(self: Path, *arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", stale)
    assert follower.new_records() == []
    monkeypatch.setattr(Path, "open", original)
    path.write_text('{"step": 0}\n{"step": 1}\n')
    assert follower.new_records() == [{"step": 1}]


@pytest.mark.parametrize("size", range(0, 75, 6))
def test_a_full_disk_tears_no_line_and_loses_none(tmp_path: Path, size: int) -> None:
    path = tmp_path / "metrics.jsonl"
    written = JsonLines(path)
    with room(size):
        for step in range(5):
            written.add({"step": step})
            with suppress(OSError):
                written.write()
            assert [line["step"] for line in lines(path)] == list(range(min(step + 1, size // 12)))
        with pytest.raises(OSError, match="File too large") if size < 60 else nullcontext():
            written.write()
    written.write(sync=True)
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 3, 4]


def test_what_a_crash_left_of_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + TORN)
    written = JsonLines(path)
    written.add({"step": 1})
    written.write()
    assert lines(path) == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("due", [False, True])
def test_the_record_of_an_evaluation_that_is_still_due_is_taken_back(due: bool, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    told = [(kind, step) for step in range(6) for kind in ("train", "eval", "seal")]
    path.write_text("".join(f'{{"kind": "{kind}", "step": {step}}}\n' for kind, step in told))
    truncate_metrics(path, 4, evaluation_due=due)
    kept = [of for of in told if of[1] < 3] + [("train", 3)] + [("eval", 3), ("seal", 3)] * (not due)
    assert [(record["kind"], record["step"]) for record in read_metrics(path)] == kept


def test_the_newest_records_reach_back_to_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"kind": "train", "step": 7, "more": "x" * 1000}) + "\n"
    path.write_text('{"kind": "eval", "step": 6, "top1_error": 9.0}\n' + 400 * line)
    assert [record["step"] for record in last_records(path)] == [6] + [7] * 400


def test_records_are_taken_back_from_the_end_without_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"kind": "train", "step": {step}}}\n' for step in range(5)))
    monkeypatch.setattr("hvd_lb.report.metrics.replace_bytes", lambda *_: pytest.fail("it takes room"))
    truncate_metrics(path, 3)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]


def test_a_file_that_takes_a_part_at_a_time_gets_all_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[: len(data) // 2 + 1])

    path = tmp_path / "metrics.jsonl"
    written = JsonLines(path)
    for step in range(3):
        written.add({"kind": "train", "step": step}, {"kind": "eval", "step": step})
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", lambda self, mode, buffering: Slow(self, mode.replace("b", "")))
            written.write()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"kind": kind, "step": step} for step in range(3) for kind in ("train", "eval")
    ]


def test_a_full_disk_is_told_once_and_ends_no_training(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    observer = RunObserver(run, 0)
    full = True
    original = os.open

    def no_room(path: Any, *more: Any, **named: Any) -> int:
        if full and str(path).startswith(str(run.path)):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *more, **named)

    monkeypatch.setattr(os, "open", no_room)
    monkeypatch.setattr(JsonLines, "write", fails_while(lambda: full, JsonLines.write))
    monkeypatch.setattr("hvd_lb.report.metrics._HEARTBEAT_SECONDS", 0.0)
    for step in range(3):
        observer.microbatch(step, 1, 2)
        observer.train(train(step))
        observer.bad_images([{"step": step, "path": "a.jpg"}])
        observer.flush()
    assert not run.metrics.exists()
    told = capsys.readouterr().err
    assert told.count("progress.json cannot be written (No space left on device)") == 1
    assert (
        told.count("metrics.jsonl cannot be written") == told.count("bad_images.jsonl cannot be written") == 1
    )
    full = False
    observer.microbatch(3, 1, 2)
    observer.train(train(3))
    observer.close()
    assert json.loads(run.heartbeat.read_text())["step"] == 3
    assert [r["step"] for r in lines(run.metrics) if r["kind"] == "train"] == [0, 1, 2, 3]
    warnings = [r["message"].split()[0] for r in lines(run.metrics) if r["kind"] == "warning"]
    assert sorted(warnings) == ["bad_images.jsonl", "metrics.jsonl", "progress.json"]
    assert [r["step"] for r in lines(run.bad_images)] == [0, 1, 2]


def fails_while(full: Any, original: Any) -> Any:
    def write(self: JsonLines, **how: Any) -> None:
        if full():
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, **how)

    return write


def test_tensorboard_forgets_what_a_rollback_takes_back(run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = RunObserver(run, 0)
    for step in range(4):
        observer.train(train(step))
    observer.rollback({"epoch": 0, "step": 3, "to": 2, "left_out": False})
    observer.train(train(2))
    observer.close()
    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [point.step for point in board.Scalars("train/loss")] == [0, 1, 2]


# TensorBoard's thread ends by the error, and Python tells of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_is_made_anew_after_an_error(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("hvd_lb.report.metrics._BOARD_SECONDS", 0.0)
    observer = RunObserver(run, 0)
    observer.train(train(0))
    observer.flush()
    assert observer._board
    board_writer = observer._board._get_file_writer().event_writer._async_writer
    writer = board_writer._writer
    with monkeypatch.context() as broken:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        broken.setattr(writer, "write", refuse)
        while observer._board:
            observer.train(train(1))
            observer.flush()
    board_writer._worker.join()  # else Python may tell of it within the next test
    observer.train(train(2))
    observer.close()
    steps = [record["step"] for record in lines(run.metrics) if record["kind"] == "train"]
    assert steps[0] == 0
    assert steps[-1] == 2
    files = sorted(run.tensorboard.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    board = EventAccumulator(str(files[1])).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [2]
    [warning] = [record for record in lines(run.metrics) if record["kind"] == "warning"]
    assert warning["message"].startswith("tensorboard cannot be written (No space left on device)")


def test_what_waits_for_room_is_taken_back_with_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "bad_images.jsonl"
    written, follower = JsonLines(path), MetricsFollower(path, 0)
    for step in range(4):
        written.add({"step": step, "path": "a.jpg"})
        if step < 2:
            written.write()
    assert len(follower.new_records()) == 2
    with room(path.stat().st_size):  # the disk is full
        written.forget(1)
    written.add({"step": 1, "path": "again"})
    written.write()
    assert [(line["step"], line["path"]) for line in lines(path)] == [(0, "a.jpg"), (1, "again")]
    assert follower.new_records() == []
    written.forget(0)
    assert follower.new_records() == []
    written.add({"step": 0})
    written.write()
    assert follower.new_records() == [{"step": 0}]


def test_a_rollback_that_says_not_where_to_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "train", "step": 3}\n{"kind": "rollback", "step": 3, "to": null}\n{"step": 4}\n'
    )
    assert [record["step"] for record in read_metrics(path)] == [3, 4]
    assert read_records(path)[1] == 1


def test_a_file_system_that_hangs_keeps_no_step_waiting(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was told meanwhile is written in its order; a checkpoint waits for it (`flush`)."""
    goes_on, hangs = threading.Event(), threading.Event()
    write, replace = JsonLines.write, replace_text

    def hanging(*arguments: Any, **options: Any) -> None:
        hangs.set()
        assert goes_on.wait(60)
        (write if isinstance(arguments[0], JsonLines) else replace)(*arguments, **options)

    monkeypatch.setattr(JsonLines, "write", hanging)
    monkeypatch.setattr("hvd_lb.report.metrics.replace_text", hanging)
    monkeypatch.setattr("hvd_lb.report.metrics._HEARTBEAT_SECONDS", 0.0)
    observer = RunObserver(run, 0)
    for step in range(50):
        observer.microbatch(step, 1, 1)
        observer.train(train(step))
    observer.rollback({"epoch": 0, "step": 49, "to": 40, "left_out": False})
    assert hangs.wait(60)
    flushed = threading.Thread(target=observer.flush)
    flushed.start()
    assert flushed.is_alive()
    assert not run.metrics.exists()
    goes_on.set()
    flushed.join(60)
    assert [record["step"] for record in lines(run.metrics)] == [*range(50), 49]
    observer.close()
    assert not [thread for thread in threading.enumerate() if "metrics" in thread.name]


def test_what_is_wrong_in_the_thread_is_told(run: RunDirectory) -> None:
    observer = RunObserver(run, 0)
    observer.warning({"message": "a record without a step"})
    observer.flush()
    with pytest.raises(KeyError, match="step"):
        observer.warning({"step": 1, "message": "later"})
    with pytest.raises(KeyError, match="step"):
        observer.close()


def test_epochs_where_the_number_of_steps_in_one_changes() -> None:
    """After 3 of 4 steps the rest of epoch 0 becomes 2 steps, and epochs have 8."""
    after = Epochs([{"kind": "rescale", "step": 3, "steps_per_epoch": 8, "offset": -3, "total_steps": 13}], 4)
    assert [after(steps) for steps in (0, 2, 3, 4, 5, 13)] == [0, 0.5, 0.75, 7 / 8, 1, 2]
    assert after.total_steps == 13
    assert (Epochs([], 4)(6), Epochs([], 4).total_steps) == (1.5, None)
