"""`hvd-lb train` as several processes that another launcher has started: one run, with the bits of any other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_runs import SMALL, kill, processes_of, trained_steps, until

from hvd_lb.report.summary import STOPPED

BIN = Path(sys.executable).parent
HVD_LB = (sys.executable, "-m", "hvd_lb_cli.main")
RECIPE = (*SMALL, "--per-gpu-batch", 16, "--reproducible", "--log-every", 1)
LAUNCHERS = {
    "torchrun": (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
        *("-m", "hvd_lb_cli.main"),
    ),
    "mpirun": ("mpirun", "-np", 2, "--oversubscribe", *HVD_LB),
    "horovodrun": (
        *(BIN / "horovodrun", "--gloo", "-np", 2, "-H", "localhost:2", "--network-interface", "lo"),
        *HVD_LB,
    ),
}
Launch = Callable[..., subprocess.Popen[str]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="needs Horovod"),
]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """launch("torchrun", …): two processes of `hvd-lb train …`, ended with the test."""
    started = []

    def start(launcher: str, *arguments: object) -> subprocess.Popen[str]:
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        process = subprocess.Popen(
            [str(word) for word in (*LAUNCHERS[launcher], "train", *arguments)],
            env={**os.environ, **allowed, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
        if process.stdout:
            process.stdout.close()


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


def simulate(run: Path, steps: int) -> bytes:
    """The weights of the run by one process."""
    command = [*HVD_LB, "simulate", *RECIPE, "--gpus", 2, "--steps", steps, "--run", "--output", run]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=240)
    return weights(run)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return simulate(tmp_path_factory.mktemp("simulated") / "run", 4)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpirun", marks=pytest.mark.long)])
def test_a_run_is_the_same_whoever_starts_it(
    launcher: str, launch: Launch, simulated: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launch(launcher, *RECIPE, "--steps", 4, "--output", run)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert weights(run) == simulated
    assert said.count("report: ") == 1, "each rank was a run of its own"
    job = json.loads((run / "logs" / "job.json").read_text())
    assert (job["starter"], job["processes"]) == ("launched", 2)
    assert job["engine"] == ("torch" if launcher == "torchrun" else "horovod")
    assert json.loads((run / "summary.json").read_text())["exit_reason"] == STOPPED
    assert not processes_of(run)


def test_a_signal_to_the_launcher_stops_the_run_with_a_checkpoint_and_it_goes_on(
    launch: Launch, hvd_lb: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launch("torchrun", *RECIPE, "--output", run)
    until(lambda: trained_steps(run) > 1, seconds=240)
    state = json.loads(hvd_lb("status", run, "--json").out)
    assert (state["state"], state["processes"]) == ("running", 2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    stopped = re.search(r"stopped after ([\d,]+) steps, with a checkpoint", said)
    assert stopped, said
    assert "hvd-lb: error" not in said
    assert not processes_of(run)
    assert "interrupted by SIGTERM" in hvd_lb("status", run).out
    steps = int(stopped[1].replace(",", "")) + 1
    process = launch("horovodrun", *RECIPE, "--steps", steps, "--output", run)
    said, _ = process.communicate(timeout=300)
    assert f"going on from step {steps - 1}" in said
    assert weights(run) == simulate(tmp_path / "one", steps)


def test_a_killed_rank_ends_all(launch: Launch, hvd_lb: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch("torchrun", *RECIPE, "--output", run)
    until(lambda: trained_steps(run) > 1, seconds=240)
    (log,) = (run / "logs").glob("rank-0001-*.log")
    kill(pid for pid in processes_of(run) if os.path.samefile(f"/proc/{pid}/fd/1", log))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.count("hvd-lb: error: ") == 1
    until(lambda: not processes_of(run), 30)
    state = json.loads(hvd_lb("status", run, "--json").out)
    assert state["state"] == "failed"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--gpus", 1), "torchrun has started 2 processes, and --gpus 1 is for 1 at most"),
        (
            ("--hosts", "h1:2"),
            "--hosts is about starting processes, and torchrun has started 2: leave it out",
        ),
    ],
    ids=["when-met", "before"],
)
def test_what_is_wrong_is_said_once(
    options: tuple[object, ...],
    error: str,
    launch: Launch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By rank 0, for which the others wait, as torchrun ends all when one has ended."""
    late = tmp_path_factory.mktemp("late")
    (late / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('LOCAL_RANK') == '0': time.sleep(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{late}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    process = launch("torchrun", *RECIPE, *options)
    said, _ = process.communicate(timeout=300)
    assert said.count("hvd-lb: error: ") == 1, said
    assert error in said
    assert re.search(r"exitcode *: 2\b", said)
    assert not list(tmp_path.iterdir())
