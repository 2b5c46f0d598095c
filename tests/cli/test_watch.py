"""`hvd-lb status`, `logs` and `stop` on directories of runs that are pretended; real ones: tests/whole_runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_lb.machine.process import this_process
from hvd_lb.report.run_directory import RunDirectory

HvdLb = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path("runs") / "a [b] run \udcff")
    run.logs.mkdir(parents=True)
    run.recipe.write_text("{}\n")
    facts = {
        "total_steps": 200,
        "steps_per_epoch": 20,
        "global_batch": 64,
        "processes": 1,
        "hosts": ["localhost"],
    }
    run.launching.write_text(json.dumps({**this_process(), **facts, "since": 1.7e9}))
    run.heartbeat.write_text('{"step": 30, "microbatch": 0, "microbatches": 1}')
    return run


def test_a_list_has_a_line_for_each_run(hvd_lb: HvdLb, run: RunDirectory) -> None:
    said = hvd_lb("status")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(r"runs/a [b] run \udcff  running      step 30/200 (15 %)  epoch 1.5  on ")
    assert said.out.count("\n") == 1


def test_no_runs(hvd_lb: HvdLb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hvd_lb("status").out == "no runs in runs: --runs names another folder\n"
    assert json.loads(hvd_lb("status", "--json").out) == []
    said = hvd_lb("status", "--runs", "nowhere")
    assert (said.status, said.err) == (
        2,
        "hvd-lb: error: nowhere is no folder: expected one with runs in it\n",
    )


def test_one_run_in_words_and_for_scripts(hvd_lb: HvdLb, run: RunDirectory) -> None:
    said = hvd_lb("status", run.path)
    assert said.out.splitlines()[:3] == [
        r"run: runs/a [b] run \udcff",
        "state: running",
        "steps: 30 of 200 (15 %), epoch 1.5",
    ]
    told = json.loads(hvd_lb("status", run.path, "--json").out)
    assert (told["state"], told["steps"], told["pid"]) == ("running", 30, os.getpid())
    assert json.loads(hvd_lb("status", "--json").out)[0].keys() == told.keys()
    documented = (Path(__file__).parents[2] / "docs" / "watching.md").read_text("utf-8")
    assert not [key for key in told if f"`{key}`" not in documented]


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_what_is_no_run_is_said_in_one_line(
    hvd_lb: HvdLb, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    for path, found in ((tmp_path, "holds no run"), (tmp_path / "nowhere", "does not exist")):
        said = hvd_lb(command, path)
        assert said.status == 2
        assert said.err == (
            f"hvd-lb: error: {path} {found}: expected a run directory, such as `hvd-lb status` lists\n"
        )
    (tmp_path / "kubectl").write_text("#!/bin/sh\n")
    (tmp_path / "kubectl").chmod(0o755)
    waiting = "; jobs that wait in Kubernetes: `kubectl get mpijobs -A "
    assert (waiting in hvd_lb(command, tmp_path).err) == (command != "logs")


def test_logs_begin_with_the_errors(hvd_lb: HvdLb, run: RunDirectory) -> None:
    run.launching_log.write_text("one\ntwo\nthree")
    (run.logs / "rank-0000-h1.log").write_text("zero\n")
    (run.logs / "rank-0003-h2.log").write_text("a\nb\n")
    error = {"rank": 3, "host": "h2", "time": 1.0, "kind": "OSError", "message": "a reason"}
    run.error(3).write_text(json.dumps(error))
    said = hvd_lb("logs", run.path, "-n", 2)
    lines = ["error: rank 3 on h2: OSError: a reason", "launching: two", "rank 0: zero", "launching: three"]
    assert said.out.splitlines() == lines
    assert hvd_lb("logs", run.path, "--rank", 3).out == "a\nb\n"
    assert "rank 3: a\n" in hvd_lb("logs", run.path, "--rank", "all").out
    said = hvd_lb("logs", run.path, "--rank", 4)
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert hvd_lb("logs", run.path, "--rank", "²").status == 2


def test_followed_logs_end_with_the_run(hvd_lb: HvdLb, run: RunDirectory) -> None:
    run.launching_log.write_text("one\n")
    run.launching.unlink()
    run.summary.write_text('{"exit_reason": "finished"}')
    assert hvd_lb("logs", run.path, "--follow").out == "launching: one\n"


def test_stop_asks_through_the_file(hvd_lb: HvdLb, run: RunDirectory) -> None:
    for _ in range(2):
        said = hvd_lb("stop", run.path, "--no-wait")
        assert (said.status, said.err) == (0, "")
        assert run.stop.read_text() == "2"
    hvd_lb("stop", run.path, "--now", "--no-wait")
    assert run.stop.read_text() == "at once"
    hvd_lb("stop", run.path, "--no-wait")
    assert run.stop.read_text() == "at once"


@pytest.mark.parametrize(
    ("reason", "said"),
    [("finished", "finished"), ("failed: rank 1 on h2 failed", "failed: rank 1 on h2 failed")],
)
def test_a_run_that_does_not_run_is_left_alone(
    hvd_lb: HvdLb, run: RunDirectory, reason: str, said: str
) -> None:
    run.launching.unlink()
    run.summary.write_text(json.dumps({"exit_reason": reason, "steps": 30}))
    stopped = hvd_lb("stop", run.path)
    assert (stopped.status, stopped.out) == (0, f"runs/a [b] run \\udcff is not running: {said}\n")
    assert not run.stop.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_others_cannot_stop_a_run(hvd_lb: HvdLb, run: RunDirectory) -> None:
    run.logs.chmod(0o555)
    said = hvd_lb("stop", run.path)
    assert said.status == 2
    assert "only who may write into the run directory can stop the run" in said.err


def test_a_waiting_job_is_taken_out_of_the_queue(
    hvd_lb: HvdLb, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this run alone: the numbers of jobs are used again."""
    run.launching.unlink()
    run.submitted.write_text('{"system": "Slurm", "job": "12"}')
    programs = tmp_path / "bin"
    programs.mkdir()
    log = run.path.absolute() / "logs" / "slurm-12.out"
    for name, lines in {
        "scontrol": "printf 'JobId=12 JobState=PENDING Reason=Resources StdOut=%s StdIn=/dev/null' \"$LOG\"",
        "scancel": f'echo "$@" > {tmp_path}/cancelled',
    }.items():
        (programs / name).write_text(f"#!{shutil.which('bash')}\n{lines}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", "/another/logs/slurm-12.out")
    assert "is not running: unknown: it was submitted as Slurm job 12" in hvd_lb("stop", run.path).out
    assert not (tmp_path / "cancelled").exists()
    monkeypatch.setenv("LOG", os.fspath(log))
    assert json.loads(hvd_lb("status", run.path, "--json").out)["state"] == "queued"
    assert hvd_lb("stop", run.path).out == "Slurm job 12, which was waiting, is cancelled\n"
    assert (tmp_path / "cancelled").read_text() == "--state=PENDING 12\n"
