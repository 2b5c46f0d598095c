"""Whole runs with real processes: the same on any p, through kills and damage, and what a user is told."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elastic_runs import with_faults
from PIL import Image
from real_runs import (
    SMALL,
    Start,
    assert_equal_metrics,
    finish,
    kill_all,
    processes_of,
    records,
    trained_steps,
    until,
)
from safetensors.numpy import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def assert_equal_weights(runs: Sequence[Path], relative: float) -> None:
    first, *others = map(weights, runs)
    for other in others:
        for name, tensor in first.items():
            scale = np.abs(tensor).max() or 1
            assert np.abs(other[name] - tensor).max() <= relative * scale, name


def a_run(run: Path, *more: object) -> list[object]:
    """100 steps (four epochs and a half) of 2 virtual workers on 2 processes, with frequent records and checkpoints."""
    return [
        *("train", *SMALL, "--gpus", 2, "--processes", 2, "--epochs", 30, "--steps", 100, "--log-every", 1),
        *("--checkpoint-every", "7steps", "--output", run, *more),
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a_run` that nobody disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "hvd_lb_cli.main", *map(str, a_run(run))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=240)
    return run


def test_every_number_of_processes_makes_the_same_run(start: Start, tmp_path: Path) -> None:
    """k = 4 on 1 and 3 processes, unevenly hosted, the last step short: fp64 leaves rounding no room to grow."""
    counts = (1, 3)
    runs = [tmp_path / f"{processes}" for processes in counts]
    recipe = ("--gpus", 4, "--per-gpu-batch", 16, "--precision", "fp64", "--last-batch", "keep")
    for processes, run in zip(counts, runs, strict=True):
        more = (*recipe, "--epochs", 1, "--log-every", 1, "--processes", processes, "--output", run)
        finish(start("train", *SMALL, *more))
    assert [record["kind"] for record in records(runs[0])] == ["train"] * 23 + ["eval"]
    assert records(runs[0])[-1]["images"] == 359
    assert_equal_metrics(runs, 1e-9)
    assert_equal_weights(runs, 1e-12)


def test_train_on_two_processes_equals_simulate(start: Start, tmp_path: Path) -> None:
    more = ("--gpus", 4, "--per-gpu-batch", 16, "--steps", 10, "--log-every", 1)
    trained, simulated = tmp_path / "trained", tmp_path / "simulated"
    finish(start("train", *SMALL, *more, "--processes", 2, "--output", trained))
    finish(start("simulate", *SMALL, *more, "--output", simulated))
    assert len(records(trained)) == 11
    assert_equal_metrics([trained, simulated], 1e-5)
    assert_equal_weights([trained, simulated], 1e-5)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_variables_of_another_job_are_not_inherited(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """As left behind by mpirun, horovodrun or srun; with a number of processes they would be a job's, and refused."""
    for launcher in ("HOROVOD", "OMPI_COMM_WORLD", "PMI", "PMIX", "HOROVOD_LOCAL", "HOROVOD_CROSS"):
        monkeypatch.setenv(f"{launcher}_RANK", "1")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "192.0.2.1")
    monkeypatch.setenv("HOROVOD_CONTROLLER", "mpi")
    more = ("--gpus", 2, "--steps", 2, "--log-every", 1, "--launcher", "local", "--processes", processes)
    finish(start("train", *SMALL, *more, "--output", tmp_path / "run"))
    assert [record["kind"] for record in records(tmp_path / "run")] == ["train", "train", "eval"]


def test_killed_it_goes_on_to_the_same_bits(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(*a_run(run))
    until(lambda: trained_steps(run) > 20)
    kill_all(run)
    assert first.wait(30) == -signal.SIGKILL

    out, _ = finish(start(*a_run(run)))
    assert "going on from step" in out
    kept = {path.name for path in (run / "logs" / "attempt-1").iterdir()}
    assert {"job.json", "launcher.log", "progress.json", "rank-0000-localhost.log"} <= kept
    assert [record["step"] for record in records(run) if record["kind"] == "train"] == list(range(100))
    assert_equal_metrics([undisturbed, run], 0)
    files = [of / "checkpoints" / "last" / "model.safetensors" for of in (undisturbed, run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_stopped_it_saves_and_goes_on_there(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    """Another checkpoint than the undisturbed run's adds up batch norm's shares once more: rounding, in float mode."""
    run = tmp_path / "run"
    first = start(*a_run(run))
    until(lambda: trained_steps(run) > 10)
    first.send_signal(signal.SIGTERM)
    out, err = finish(first, 128 + signal.SIGTERM)
    assert "SIGTERM: finishing this step, then a checkpoint" in out
    told = re.search(r"stopped after (\d+) steps, with a checkpoint; the same command goes on there", out)
    assert told
    steps = int(told[1])
    assert err == ""
    assert summary(run)["exit_reason"] == "interrupted by SIGTERM"
    assert (run / "checkpoints" / "last").resolve().name == f"step-{steps:08d}"
    assert trained_steps(run) == steps
    assert not processes_of(run)
    out, _ = finish(start(*a_run(run)))
    assert f"going on from step {steps} " in out
    assert_equal_metrics([undisturbed, run], 1e-6)
    stopped, whole = weights(run), weights(undisturbed)
    assert all(np.array_equal(stopped[name], whole[name]) for name in whole if "running" not in name)
    assert_equal_weights([undisturbed, run], 1e-6)


@pytest.mark.parametrize("removed", [".", ".lock", "environment.json"])
def test_a_run_whose_folder_is_removed_makes_it_again_and_is_stopped_as_others(
    start: Start, tmp_path: Path, hvd_lb: Callable[..., Any], removed: str
) -> None:
    """Or a part of it, as by a removal that others' files have stopped."""
    run = tmp_path / "run"
    process = start(*a_run(run, "--epochs", 2000, "--steps", 100_000))
    until(lambda: trained_steps(run) > 10)
    (run / removed).resolve().rename(tmp_path / "removed")  # at once, where rmtree would meet new files
    until(lambda: all((run / name).exists() for name in (".lock", "recipe.yaml", "environment.json")))
    second = hvd_lb(*a_run(run, "--epochs", 2000, "--steps", 100_000))
    assert (second.status, second.out) == (2, "")
    assert "is in use by another run" in second.err
    until((run / "logs" / "job.json").exists)  # who joins an elastic run reads it
    assert (run / "logs" / "job.json").stat().st_mode & 0o077 == 0
    until(lambda: json.loads(hvd_lb("status", run, "--json").out)["state"] == "running")
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, 128 + signal.SIGTERM)
    assert f"{run}, or a part of it, was removed while this run writes there" in "".join(out.split("\n"))
    assert "SIGTERM: finishing this step, then a checkpoint" in out
    assert "interrupted by SIGTERM" in hvd_lb("status", run).out
    assert hvd_lb("evaluate", run).status == 0


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_another_one_has_taken_the_place_of_ends_and_leaves_it_alone(
    start: Start, tmp_path: Path, hvd_lb: Callable[..., Any], processes: int
) -> None:
    """It was away, or slow, when its folder was renamed and the same command was typed again."""
    run = tmp_path / "run"
    endless = ("--processes", processes, "--epochs", 2000, "--steps", 100_000, "--checkpoint-every", "never")
    first = start(*a_run(run, *endless))
    until(lambda: trained_steps(run) > 3)
    first.send_signal(signal.SIGSTOP)
    run.rename(tmp_path / "renamed")
    second = start(*a_run(run, *endless))
    until(lambda: (run / "logs" / "progress.json").exists() or second.poll() is not None)
    first.send_signal(signal.SIGCONT)
    _, err = finish(first, 2)
    assert err == (
        f"hvd-lb: error: {run} was removed or renamed while this run wrote there, and another run is there now: this "
        "one ends\n"
    )
    assert json.loads(hvd_lb("status", run, "--json").out)["pid"] == second.pid
    before = trained_steps(run)
    until(lambda: trained_steps(run) > before + 3 or second.poll() is not None)
    second.send_signal(signal.SIGTERM)
    finish(second, 128 + signal.SIGTERM)
    assert not processes_of(run)


@pytest.mark.parametrize(
    "processes",
    [
        ("--processes", 1),
        *(pytest.param(("--processes", 2, *more), marks=pytest.mark.long) for more in ((), ("--elastic",))),
    ],
)
def test_ranks_that_end_with_exit_code_0_before_the_end_have_failed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: Sequence[object]
) -> None:
    """As when a library calls exit; the same command goes on."""
    run, several = tmp_path / "run", processes[1] == 2
    with_faults(tmp_path, monkeypatch, [(rank, "step", 5, "exit") for rank in ((0, 1) if several else (-1,))])
    command = ["train", *SMALL, "--gpus", 2, *processes, "--steps", 9, "--log-every", 1, "--output", run]
    _, err = finish(start(*command), 1)
    if "--elastic" in processes:  # where each of them counts as lost
        why = "all processes that had the state of the run were lost; rank [01] on localhost ended with exit code 0"
    else:
        why = "the ranks ended with exit code 0 after step [45] of 9, without a word: "
    assert re.search(f"error: {why}", err)
    assert re.match(f"failed: {why[:40]}", summary(run)["exit_reason"])
    monkeypatch.setenv("FAULTS", "[]")
    finish(start(*command))
    assert summary(run)["steps"] == 9


def test_a_second_signal_ends_at_once(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*a_run(run, "--epochs", 3000, "--steps", 60_000, "--checkpoint-every", "never"))
    until(lambda: trained_steps(run) > 3)
    until(lambda: stopped_workers(run))
    process.send_signal(signal.SIGINT)
    until(lambda: (run / "logs" / "stop").exists())
    process.send_signal(signal.SIGINT)
    out, _ = finish(process, 128 + signal.SIGINT)
    assert "stopped at once; the same command goes on from the last checkpoint" in out
    assert not processes_of(run)
    assert not list((run / "checkpoints").glob("step-*"))


def test_a_second_signal_does_not_wait_for_the_step(start: Start, tmp_path: Path) -> None:
    """One process, whose signals no horovodrun hands on: a step of some seconds is given up, and saves nothing."""
    run = tmp_path / "run"
    recipe = ("--gpus", 1024, "--per-gpu-batch", 1, "--model", "resnet20", "--epochs", 99)
    process = start("train", *SMALL, *recipe, "--processes", 1, "--output", run)
    until(lambda: (run / "logs" / "progress.json").exists())
    process.send_signal(signal.SIGTERM)
    until(lambda: (run / "logs" / "stop").exists())
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, 128 + signal.SIGTERM)
    assert "stopped at once" in out
    assert not processes_of(run)
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)],
    ids=lambda number: number.name,
)
def test_a_signal_to_one_worker_ends_the_run_with_a_checkpoint(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """As schedulers send it: not to the launching process, and not to rank 0."""
    run = tmp_path / "run"
    process = start(*a_run(run, "--epochs", 3000, "--steps", 60_000))
    until(lambda: trained_steps(run) > 3)
    os.kill(worker_of_rank(run, 1), number)
    out, _ = finish(process, 128 + number)
    assert "with a checkpoint; the same command goes on there" in out
    assert (run / "checkpoints" / "last" / "state.json").exists()


def test_a_signal_to_all_processes_of_a_run_ends_it_with_a_checkpoint(start: Start, tmp_path: Path) -> None:
    """As Slurm sends SIGUSR1 before the time limit: to whoever launches, the head, the agent and the ranks."""
    run = tmp_path / "run"
    process = start(*a_run(run, "--epochs", 3000, "--steps", 60_000))
    until(lambda: trained_steps(run) > 3)
    everyone = {process.pid, *processes_of(run)}
    assert len(everyone) > 3
    for pid in everyone:
        os.kill(pid, signal.SIGUSR1)
    out, err = finish(process, 128 + signal.SIGUSR1)
    assert "SIGUSR1: finishing this step, then a checkpoint" in out
    assert "with a checkpoint; the same command goes on there" in out
    assert (err, summary(run)["exit_reason"]) == ("", "interrupted by SIGUSR1")
    assert (run / "checkpoints" / "last" / "state.json").exists()


@pytest.mark.parametrize(
    "more", [pytest.param((), marks=pytest.mark.long), ("--elastic",)], ids=["fixed", "elastic"]
)
def test_processes_that_still_load_hear_that_they_are_to_end(
    start: Start, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """A job of Slurm that is preempted while torch is loaded: SIGTERM to all; it has to be able to go on."""
    run = tmp_path / "run"
    process = start(*a_run(run, "--epochs", 3000, "--steps", 60_000, *more))

    def ranks() -> list[Path]:
        folders = (Path(f"/proc/{pid}") for pid in processes_of(run))
        return [folder for folder in folders if "launch.rank.entry" in (folder / "cmdline").read_text()]

    def listens(rank: Path) -> bool:
        caught = (rank / "status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    until(lambda: len(ranks()) == 2 and all(map(listens, ranks())), every=0.02)
    for rank in ranks():
        os.kill(int(rank.name), signal.SIGTERM)
    out, err = finish(process, 128 + signal.SIGTERM)
    assert (err, summary(run)["exit_reason"]) == ("", "interrupted by SIGTERM"), out
    assert (run / "checkpoints" / "last" / "state.json").exists()
    assert trained_steps(run) <= 2


def test_a_killed_launcher_takes_its_workers_along(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start(*a_run(run))
    until(lambda: trained_steps(run) > 3)
    launcher.kill()
    until(lambda: not processes_of(run), 20)


def test_a_damaged_checkpoint_is_passed_over(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    newest = run / "checkpoints" / "last" / "model.safetensors"
    newest_size = newest.stat().st_size
    newest.write_bytes(newest.read_bytes()[:-1])
    out, _ = finish(start(*a_run(run)))
    assert "step-00000100 is damaged: model.safetensors is truncated" in out
    assert "going on from step 98" in out
    assert (
        run / "checkpoints" / "damaged-step-00000100" / "model.safetensors"
    ).stat().st_size == newest_size - 1
    last = "checkpoints/last/model.safetensors"
    assert (run / last).read_bytes() == (undisturbed / last).read_bytes()


def test_a_run_killed_after_its_end_is_summed_up(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    """Between the last checkpoint and the summary, with `last` not yet pointing there."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    for file in ("summary.json", "report.html", "curves.png"):
        (run / file).unlink()
    last = run / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("step-00000098")
    (run / "checkpoints" / ".last").symlink_to("step-00000100")
    before = records(run)
    out, err = finish(start(*a_run(run)))
    assert err == ""
    assert "ended: stopped at --steps" in out
    assert last.resolve().name == "step-00000100"
    assert summary(run)["final"] == summary(undisturbed)["final"]
    assert (run / "report.html").exists()
    assert records(run) == before
    out, _ = finish(start(*a_run(run)))
    assert "at the end of this run already" in out


def test_a_finished_run_is_left_alone(start: Start, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    out, err = finish(start(*a_run(undisturbed)))
    assert err == ""
    assert out.count("\n") == 1
    assert "at the end of this run already (100 of 100 steps)" in out
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}


def test_a_broken_image_ends_the_job_with_its_name(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 1)):
        for name in ("grüne Äpfel", "pears"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"no {i}.jpg")
    broken = tmp_path / "data" / "train" / "grüne Äpfel" / "no 7.jpg"
    broken.write_bytes(broken.read_bytes()[:700])  # its header says 40 x 40, and few pixels follow
    run = tmp_path / "run"
    arguments = ("--data", tmp_path / "data", "--device", "cpu", "--model", "resnet8", "--threads", 1)
    more = ("--gpus", 2, "--per-gpu-batch", 4, "--epochs", 9, "--output", run)
    _, err = finish(start("train", *arguments, *more), 1)
    assert err.count("\n") == 1
    assert f"{broken}: cannot be decoded" in err
    assert "rank " in err
    assert "no 7.jpg" in summary(run)["exit_reason"]
    assert not processes_of(run)


def worker_of_rank(run: Path, rank: int) -> int:
    """The process of a rank, by what horovodrun put into its environment."""
    for process in processes_of(run):
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        if f"HOROVOD_RANK={rank}".encode() in environment and b"hvd_lb.launch.rank.entry" in command[:5]:
            return process
    raise AssertionError(f"no worker of rank {rank}")


def stopped_workers(run: Path) -> bool:
    """Stops the workers (SIGSTOP): a step that never ends."""
    for rank in (0, 1):
        os.kill(worker_of_rank(run, rank), signal.SIGSTOP)
    return True


def test_variables_of_env_by_which_kernels_are_chosen_count_where_a_run_goes_on(
    start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    small = ("train", *SMALL, "--gpus", 2, "--processes", 2, "--reproducible", "--output", run, "--steps")
    named = ("--env", "MKL_CBWR=COMPATIBLE")
    finish(start(*small, 1, *named))
    assert "warning" not in "".join(finish(start(*small, 2, *named)))
    assert "MKL_CBWR: COMPATIBLE → not set" in "".join(finish(start(*small, 3)))
    assert "MKL_CBWR: not set → COMPATIBLE" in "".join(finish(start(*small, 4, *named)))
