"""`hvd-lb train --elastic` within a Slurm job: ranks, agents and nodes are lost, and come back or do not.

The weights are those of the undisturbed run, bitwise.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from elastic_runs import (
    RECIPE,
    RESCALED,
    Fault,
    assert_it_comes_again,
    assert_the_same,
    events,
    with_faults,
)
from hosts import Host, lab
from real_runs import finish, kill_all, processes_of, trained_steps, until
from slurm import Cluster, slurm, start_node

pytest.importorskip("horovod")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]
horovod_and_torch = pytest.mark.parametrize("engine", ["horovod", "torch"])

HVD_LB = [sys.executable, "-P", "-m", "hvd_lb_cli.main"]
# The others wait for who takes the place of a lost one.
ALL = ("--min-processes", 3)
NODE_TIMEOUT = 20  # for a node to be booted in


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(["h0", "h1", "h2", "h3"]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def cluster(hosts: list[Host]) -> Iterator[Cluster]:
    with slurm(hosts[0], dict.fromkeys(hosts[1:], 2), NODE_TIMEOUT) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [*HVD_LB, *RECIPE, "--processes", 1, "--output", run]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return run


@contextmanager
def running(
    cluster: Cluster,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: Sequence[Fault],
    *options: object,
    by: Sequence[object] = ("salloc", "--no-kill", "--nodes=3", "--ntasks-per-node=1"),
    recipe: Sequence[object] = RECIPE,
) -> Iterator[subprocess.Popen[str]]:
    """From the head node, in an allocation of three nodes with a process on each."""
    with_faults(folder, monkeypatch, faults)
    run, pipe = folder / "run", subprocess.PIPE
    idle(cluster)
    train = [*HVD_LB, *recipe, "--elastic", "--env", "FAULTS", *options, "--output", run]
    process = cluster.controller.start(
        [*by, *train], env=cluster.environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    try:
        yield process
    finally:
        cluster.run(["scancel", "--user=root"])
        kill_all(run)
        process.kill()
        process.communicate()


def idle(cluster: Cluster) -> None:
    """All nodes are there, and have no job."""
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"]
    until(lambda: set(cluster.run(command).stdout.split()) == {"idle"}, 120, every=0.3)


def finished(process: subprocess.Popen[str], undisturbed: Path, run: Path) -> str:
    """What it printed, once it has come to the end of the undisturbed run and left nothing behind."""
    out, _ = finish(process, seconds=300)
    assert_the_same(undisturbed, run)
    until(lambda: not processes_of(run), 60)
    return out


def begin_again(cluster: Cluster, job: str) -> None:
    """A job that is back in the queue; by itself Slurm would wait for two minutes."""
    # A node that still clears up refuses it, and the two minutes are for that.
    until(lambda: "comp" not in cluster.run(["sinfo", "--noheader", "--format=%t"]).stdout, 120, every=0.3)
    time.sleep(3)
    cluster.run(["scontrol", "update", f"job={job}", "StartTime=now"])


def agent_of(host: Host, run: Path) -> str:
    (pid,) = host.run(["pgrep", "-f", f"^[^ ]*python -P -m hvd_lb.launch.agent.host {run}"]).stdout.split()
    return str(pid)


@horovod_and_torch
@pytest.mark.parametrize("fault", [(2, "step", 5, "SIGKILL"), (0, "sums", 7, "SIGKILL")])
def test_a_rank_that_is_killed_is_replaced_on_its_node(
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    fault: Fault,
) -> None:
    run = tmp_path / "run"
    with running(cluster, tmp_path, monkeypatch, [fault], *ALL, "--engine", engine) as process:
        out = finished(process, undisturbed, run)
    (change,) = events(run)
    who = f"rank {fault[0]} on h{fault[0] + 1}"
    assert (change["lost"], change["joined"]) == ([f"{who} (ended by SIGKILL)"], 1)
    assert who in out


@horovod_and_torch
@pytest.mark.parametrize("how", ["agent", "node"])
@pytest.mark.parametrize("which", [1, 0])
def test_a_node_is_lost_and_comes_back(
    hosts: list[Host],
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    how: str,
    which: int,
) -> None:
    """By its agent, or all that runs there; Slurm has not given it up by then."""
    if how == "agent" and engine == "torch":
        pytest.skip("as with Horovod")
    run, here, node = tmp_path / "run", tmp_path / "go", hosts[1 + which]
    options = (*ALL, "--engine", engine, "--hang-timeout", 16)
    with running(cluster, tmp_path, monkeypatch, [(2, "step", 5, str(here))], *options) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None, 240)
        until(lambda: events(run, "digest"))  # what a lost rank 0 is about to write is missing
        if how == "agent":
            node.run(["kill", "-KILL", agent_of(node, run)])
        else:
            node.kill()
        here.touch()
        if how == "node":
            node.boot()
            start_node(cluster, node)
        out = finished(process, undisturbed, run)
    changes = events(run)
    assert [lost for change in changes for lost in change["lost"]][0].startswith(
        f"rank {which} on {node.name} ("
    )
    assert changes[-1]["processes"] == 3
    assert f"{node.name} is back: 1 starting there" in out


def test_the_others_go_on_without_a_node_that_slurm_has_given_up(
    hosts: list[Host],
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And do not wait for it any more."""
    run, here, node = tmp_path / "run", tmp_path / "go", hosts[3]
    options = ("--hang-timeout", 240)
    with running(cluster, tmp_path, monkeypatch, [(0, "step", 8, str(here))], *options) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None, 240)
        node.kill()
        log = run / "logs" / "launcher.log"
        until(lambda: "h3 does not come back" in log.read_text() or process.poll() is not None, 200)
        here.touch()
        out = finished(process, undisturbed, run)
        node.boot()
        start_node(cluster, node)
    assert [change["processes"] for change in events(run) if change["lost"]] == [2]
    assert out.count("h3 does not come back: Slurm has taken it out of the job") == 1


def test_k_follows_the_nodes_that_there_are(
    hosts: list[Host], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go, back = tmp_path / "run", tmp_path / "go", tmp_path / "back"
    faults: list[Fault] = [(0, "step", 3, str(go)), (0, "step", 6, str(back))]
    recipe = (*RESCALED, "--gpus", 6, "--per-gpu-batch", 24)
    log = run / "logs" / "launcher.log"
    with running(cluster, tmp_path, monkeypatch, faults, recipe=recipe) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None, 240)
        hosts[3].run(["kill", "-KILL", agent_of(hosts[3], run)])
        go.touch()
        until(lambda: (tmp_path / "back.there").exists() or process.poll() is not None, 240)
        until(lambda: "on h3 is ready to join" in log.read_text() or process.poll() is not None)
        back.touch()
        finish(process, seconds=300)
    assert [scale.workers for scale in assert_it_comes_again(run).scales(None)] == [6, 4, 6]


@pytest.mark.long
def test_started_again_it_has_the_nodes_that_are_left(
    hosts: list[Host],
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, here, node = tmp_path / "run", tmp_path / "go", hosts[3]
    options = ("--hang-timeout", 240, "--restarts", 1)
    with running(cluster, tmp_path, monkeypatch, [(0, "step", 8, str(here))], *options) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None, 240)
        node.kill()
        log = run / "logs" / "launcher.log"
        until(lambda: "h3 does not come back" in log.read_text() or process.poll() is not None, 200)
        for other in hosts[1:3]:
            other.run(["pkill", "-KILL", "-f", f"hvd_lb.launch.rank.entry {run}"])
        here.touch()
        out = finished(process, undisturbed, run)
        node.boot()
        start_node(cluster, node)
    assert "starting again (--restarts; 0 more after this one)" in out
    assert "hosts: h1:1, h2:1 (Slurm job" in out


def test_a_submitted_job_survives_its_nodes(
    hosts: list[Host],
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other goes while it goes on; that of the script puts it back into the queue."""
    run, here = tmp_path / "run", [tmp_path / "one", tmp_path / "two"]
    faults: list[Fault] = [(1, "step", 6, str(here[0])), (1, "step", 9, str(here[1]))]
    where = ("--launcher", "slurm", "--submit", "--per-node", 1, "--processes", 3, "--slurm-time", 30)
    with running(cluster, tmp_path, monkeypatch, faults, *where, "--env", "PYTHONPATH", by=()) as process:
        until(lambda: (tmp_path / "one.there").exists() or process.poll() is not None, 240)
        hosts[3].kill()
        here[0].touch()
        until(lambda: (tmp_path / "two.there").exists() or process.poll() is not None, 240)
        job = cluster.run(["squeue", "--noheader", "--format=%i"]).stdout.strip()
        assert cluster.job(job)["BatchHost"] == "h1"
        hosts[1].kill()
        until(lambda: cluster.job(job)["Restarts"] == "1", 240, every=0.5)
        for node in (hosts[1], hosts[3]):
            node.boot()
            start_node(cluster, node)
        here[1].touch()
        begin_again(cluster, job)
        out = finished(process, undisturbed, run)
    assert f"job {job}: completed, start 2" in out
    assert "going on from step 8" in out


@pytest.mark.long
def test_out_of_time_preempted_and_put_back_a_job_goes_on_from_its_last_step(
    cluster: Cluster, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time rank 0 waits before a step, and the job stops after it; between two stops a rank is killed."""
    run, stop = tmp_path / "run", tmp_path / "run" / "logs" / "stop"
    faults: list[Fault] = [
        *((0, "step", step, str(tmp_path / f"go{step}")) for step in (2, 6, 9)),
        (1, "step", 5, "SIGKILL"),
    ]
    where = ("--launcher", "slurm", "--submit", "--per-node", 1, "--processes", 3, "--slurm-time", 30)
    with running(cluster, tmp_path, monkeypatch, faults, *where, "--env", "PYTHONPATH", by=()) as process:

        def stopped(step: int, restarts: int, command: Sequence[object], script: str | None = None) -> str:
            """By this command while it is in that step, and back in the queue; the job."""
            until(lambda: (tmp_path / f"go{step}.there").exists() or process.poll() is not None, 240)
            job = cluster.run(["squeue", "--noheader", "--name=run", "--format=%i"]).stdout.strip()
            cluster.run([str(word).replace("JOB", job) for word in command], input=script)
            log = run / "logs" / "launcher.log"
            until(lambda: stop.exists() or log.read_text().count("has notice to end") == 3)
            time.sleep(1)  # for rank 0 to look for it
            (tmp_path / f"go{step}").touch()
            until(lambda: back_in_the_queue(cluster, job, restarts) or process.poll() is not None)
            return job

        job = stopped(2, 1, ["scontrol", "update", "job=JOB", "TimeLimit=2"])
        cluster.run(["scontrol", "update", f"job={job}", "TimeLimit=30"])
        begin_again(cluster, job)
        urgent = ["sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
        begin_again(cluster, stopped(6, 2, urgent, "#!/bin/sh\nsleep 1\n"))
        begin_again(cluster, stopped(9, 3, ["scontrol", "requeue", "JOB"]))
        out = finished(process, undisturbed, run)
    assert f"job {job}: completed, start 4" in out
    went_on = [int(step) for step in re.findall(r"going on from step (\d+) ", out)]
    assert [step - gate in (1, 2) for step, gate in zip(went_on, (2, 6, 9), strict=True)] == [True] * 3
    assert ["rank 1 on h2 (ended by SIGKILL)"] in [change["lost"] for change in events(run)]


def back_in_the_queue(cluster: Cluster, job: str, restarts: int) -> bool:
    state = cluster.job(job)
    return (state["JobState"], state["Restarts"]) == ("PENDING", str(restarts))


def test_a_cancelled_job_stops_with_a_checkpoint(
    cluster: Cluster, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGTERM to all of its processes, which for one of them alone would mean to leave."""
    run, here = tmp_path / "run", tmp_path / "go"
    where = ("--launcher", "slurm", "--submit", "--per-node", 1, "--processes", 3, "--slurm-time", 30)
    options = (*where, "--env", "PYTHONPATH")
    with running(cluster, tmp_path, monkeypatch, [(0, "step", 6, str(here))], *options, by=()) as process:
        until(lambda: (tmp_path / "go.there").exists() or process.poll() is not None, 240)
        here.touch()
        cluster.run(["scancel", cluster.run(["squeue", "--noheader", "--format=%i"]).stdout.strip()])
        finish(process, 128 + signal.SIGTERM)
    stopped = trained_steps(run)
    assert (run / "checkpoints" / "last").resolve().name == f"step-{stopped:08}"
