"""Jobs of a real Slurm: ranks started by srun without ssh; submitted, cancelled, out of time, preempted, nodes lost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hosts import Host, lab
from real_runs import finish, trained_steps, until
from slurm import Cluster, slurm, start_node

from hvd_lb.launch.allreduce import installed_build

CODE = os.environ.get("PYTHONPATH") or str(Path(__file__).parents[2])
HVD_LB = [sys.executable, "-P", "-m", "hvd_lb_cli.main"]
CORES = {"h1": 2, "h2": 2, "h3": 3}
RECIPE = (
    *("--data", "digits", "--device", "cpu", "--model", "resnet8", "--threads", "1", "--reproducible"),
    *("--gpus", "4", "--per-gpu-batch", "24", "--epochs", "8"),
    *("--checkpoint-every", "5steps", "--log-every", "1"),
)
STEPS = 8 * 14
Submit = Callable[..., subprocess.Popen[str]]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(["h0", *CORES]) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def cluster(hosts: list[Host]) -> Iterator[Cluster]:
    with slurm(hosts[0], {host: CORES[host.name] for host in hosts[1:]}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def simulated(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("simulated") / "run"
    hosts[0].run([*HVD_LB, "simulate", *RECIPE, "--run", "--output", run], timeout=600)
    return run


@pytest.fixture
def submit(cluster: Cluster) -> Iterator[Submit]:
    """submit(RUN, …): `hvd-lb train --launcher slurm --submit` on the head node; its jobs end with the test."""
    started = []

    def start(run: Path, *options: object) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        where = ("--launcher", "slurm", "--submit", "--per-node", 2, "--slurm-time", 30)
        process = cluster.controller.start(
            [*HVD_LB, "train", *RECIPE, *where, *options, "--output", run],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
        )
        started.append(process)
        return process

    yield start
    cluster.run(["scancel", "--user=root"])
    for process in started:
        process.kill()
        process.communicate()
    idle(cluster)


def idle(cluster: Cluster) -> None:
    until(lambda: not cluster.run(["squeue", "--noheader"]).stdout, 60, every=0.3)


def batch(cluster: Cluster, script: str, folder: Path, *options: object) -> str:
    """What a batch script wrote, once the job has ended."""
    log = folder / "log"
    command = ["sbatch", "--parsable", f"--output={log}", *options]
    job = cluster.run(command, input=script, env={"PYTHONPATH": CODE, "SECRET": "geheim"}).stdout.strip()
    until(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), 600, every=0.3)
    return log.read_text()


def job_of(cluster: Cluster, run: Path) -> str:
    """The number of the job that has that run's folder's name, once it is there."""
    command = ["squeue", "--noheader", f"--name={run.name}", "--format=%i"]
    until(lambda: cluster.run(command).stdout, 30)
    return cluster.run(command).stdout.strip()


def restarted(cluster: Cluster, job: str, restarts: int) -> None:
    """Wait until it is back in the queue, and let it begin at once: Slurm would wait for two minutes."""

    def queued() -> bool:
        state = cluster.job(job)
        return (state["JobState"], state["Restarts"]) == ("PENDING", str(restarts))

    until(queued, 120, every=0.3)
    # A node that still clears up after the first start refuses the second one; the two minutes are for that.
    until(lambda: "comp" not in cluster.run(["sinfo", "--noheader", "--format=%t"]).stdout, 120, every=0.3)
    time.sleep(3)
    cluster.run(["scontrol", "update", f"job={job}", "StartTime=now"])


def assert_same(host: Host, *runs: Path) -> None:
    said = host.run([*HVD_LB, "compare", *runs], check=False).stdout
    assert said.splitlines()[-1] == "bitwise identical", said


def test_ranks_fill_uneven_nodes_with_one_process_of_slurm_on_each(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = [*HVD_LB, "train", *RECIPE, "--gpus", "7", "--steps", "2", "--env", "SECRET", "--output", run]
    log = batch(
        cluster, f"#!/bin/sh\nexec {shlex.join(map(str, train))}\n", tmp_path, "--nodes=3", "--ntasks=7"
    )
    assert "hosts: h1:2, h2:2, h3:3 (Slurm job" in log
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    ranks = json.loads((run / "logs" / "ranks.json").read_text())["ranks"]
    assert [ranks[str(rank)]["host"] for rank in range(7)] == ["h1", "h1", "h2", "h2", "h3", "h3", "h3"]
    assert all("pid" in ranks[str(rank)] for rank in range(7))


def test_both_engines_and_one_process_end_at_the_same_bits(
    cluster: Cluster, simulated: Path, tmp_path: Path
) -> None:
    """On three nodes, from a batch script."""
    for engine in ("horovod", "torch"):
        run = tmp_path / engine
        train = [*HVD_LB, "train", *RECIPE, "--engine", engine, "--output", run]
        (tmp_path / "jobs").mkdir(exist_ok=True)
        script = f"#!/bin/sh\nexec {shlex.join(map(str, train))}\n"
        log = batch(cluster, script, tmp_path / "jobs", "--nodes=3", "--ntasks=4")
        assert f"engine: {engine}, as asked for" in log
        assert_same(cluster.controller, simulated, run)


def test_the_network_between_the_nodes_of_a_job_is_measured(cluster: Cluster, tmp_path: Path) -> None:
    figures, runs = tmp_path / "figures.json", tmp_path / "runs"
    check = [*HVD_LB, "doctor", "--network", "--device", "cpu", "--output", runs, "--json", figures]
    own = "export SLURM_LABELIO=1 SLURM_EXCLUSIVE=1"  # for steps of the user's own
    script = f"#!/bin/sh\n{own}\nexec {shlex.join(map(str, check))}\n"
    log = batch(cluster, script, tmp_path, "--nodes=3", "--ntasks=3")
    assert "allreduce between 3 processes on cpu, float32:" in log
    found = json.loads(figures.read_text())
    assert [host["name"] for host in found["hosts"]] == ["h1", "h2", "h3"]
    assert len(found["links"]) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "log"]


def test_open_mpi_has_a_task_for_each_rank(cluster: Cluster, tmp_path: Path) -> None:
    if "pmix" not in cluster.run(["srun", "--mpi=list"], check=False).stdout or not installed_build().mpi:
        pytest.skip("needs PMIx in Slurm and MPI in Horovod")
    run = tmp_path / "run"
    train = [*HVD_LB, "train", *RECIPE, "--steps", "2", "--allreduce", "halving-doubling", "--output", run]
    log = batch(
        cluster, f"#!/bin/sh\nexec {shlex.join(map(str, train))}\n", tmp_path, "--nodes=2", "--ntasks=4"
    )
    assert json.loads((run / "summary.json").read_text())["steps"] == 2, log
    assert not (run / "logs" / "ranks.json").exists()


@pytest.mark.parametrize(
    ("signal_name", "told"), [("KILL", "ended by SIGKILL"), ("SEGV", "ended by SIGSEGV")]
)
def test_a_rank_that_ends_is_named_with_its_node(
    cluster: Cluster, submit: Submit, tmp_path: Path, signal_name: str, told: str
) -> None:
    run = tmp_path / "run"
    process = submit(run, "--no-slurm-requeue")
    until(lambda: trained_steps(run) >= 2, 240)
    rank = json.loads((run / "logs" / "ranks.json").read_text())["ranks"]["3"]
    cluster.run(["srun", "--jobid", job_of(cluster, run), "--overlap", "--nodelist=h2", "--nodes=1", "--ntasks=1",
                 "kill", f"-{signal_name}", rank["pid"]])  # fmt: skip
    out, _ = finish(process, 1)
    assert "rank 3 on h2 failed" in out
    assert told in out


SEEN = """#!/bin/sh
exec {python} -c '
import subprocess
from hvd_lb.launch.starters.allocation import allocation, srun_command
seen = ["sh", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"]
job = allocation("auto")
subprocess.run(srun_command(job.nodes, seen, gpus=job.gpus), check=True)
'
"""
# More GPUs than cores; more tasks than cores; ways to ask by which Slurm would show each task one GPU, as number 0.
ASKED = (
    "--gpus-per-node=2",
    "--gpus-per-node=lab:2 --ntasks-per-node=2",
    "--gres=gpu:2",
    "--gpus=4",
    "--gpus=4 --ntasks-per-gpu=1",
    "--gpus-per-task=1 --ntasks-per-node=2",
    "--gpus-per-task=lab:1 --ntasks-per-node=2 --cpus-per-task=1",
    "--gpus-per-node=2 --cpus-per-task=2",
    "--gpus-per-node=2 --nodes=2 --ntasks=6 --overcommit",
    "--gpus-per-node=2 --cpus-per-gpu=1",
    "--exclusive",
    "--exclusive --gpus-per-node=2",
)


@pytest.mark.parametrize("options", ASKED)
def test_each_rank_sees_all_gpus_of_its_node(cluster: Cluster, tmp_path: Path, options: str) -> None:
    log = batch(cluster, SEEN.format(python=sys.executable), tmp_path, "--nodelist=h[1-2]", *options.split())
    lines = sorted(line for line in log.splitlines() if not line.startswith("srun:"))
    assert lines == ["0 h1 0,1", "1 h1 0,1", "2 h2 0,1", "3 h2 0,1"], log


@pytest.mark.parametrize(
    "options", ["--gpus-per-node=2", "--gpus=4", "--gpus-per-task=1 --ntasks-per-node=2"]
)
def test_an_allocation_is_used_from_where_it_was_asked_for(
    cluster: Cluster, tmp_path: Path, options: str
) -> None:
    (tmp_path / "seen").write_text(SEEN.format(python=sys.executable))
    (tmp_path / "seen").chmod(0o700)
    allocate = ["salloc", "--nodelist=h[1-2]", *options.split()]
    environment = {"PYTHONPATH": CODE}
    said = cluster.run([*allocate, tmp_path / "seen"], env=environment)  # runs on the head node
    assert sorted(said.stdout.splitlines()) == ["0 h1 0,1", "1 h1 0,1", "2 h2 0,1", "3 h2 0,1"], said
    idle(cluster)
    # Without a command it is a shell on the first node.
    shell = ["script", "-qec", " ".join(allocate), "/dev/null"]
    said = cluster.run(shell, env=environment, input=f"exec {tmp_path}/seen\n")
    lines = [line.strip() for line in said.stdout.splitlines()]
    assert [line for line in sorted(lines) if line[:1].isdigit()] == [
        "0 h1 0,1",
        "1 h1 0,1",
        "2 h2 0,1",
        "3 h2 0,1",
    ]
    idle(cluster)


SHOWN = """#!/bin/sh
exec {python} -c '
import json, os
from hvd_lb.errors import UserError
from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.target import find_target
try:
    target = find_target(LaunchOptions(), "auto", os.environ)
    print("SHOWN", target.kind, *target.hosts)
except UserError as error:
    print("SHOWN", error)
'
"""


@pytest.mark.parametrize(
    ("options", "before", "shown"),
    [
        ("--nodes=2 --gpus-per-node=2", "srun --nodes=1 --ntasks=1 --gpus=1 sh", "local"),
        ("--nodes=1 --gpus-per-node=2", "", "local"),
        ("--nodelist=h[1-2] --gpus=3", "", "has 2 on h1, 1 on h2"),
        ("--nodes=2 --ntasks-per-node=2", "", "slurm h1:2 h2:2"),
        ("--nodes=1 : --nodes=1", "", "heterogeneous Slurm job of 2 components"),
    ],
)
def test_what_an_allocation_is_taken_for(
    cluster: Cluster, tmp_path: Path, options: str, before: str, shown: str
) -> None:
    script = tmp_path / "shown"
    script.write_text(SHOWN.format(python=sys.executable))
    script.chmod(0o700)
    log = batch(cluster, f"#!/bin/sh\n{before} {script}\n", tmp_path, *options.split())
    assert shown in " ".join(line for line in log.splitlines() if line.startswith("SHOWN")), log
    assert "--hosts" not in log
    idle(cluster)


def test_each_task_of_an_array_has_its_own_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """One of them has the array's number, by which Slurm tells of all."""
    script = tmp_path / "shown"
    script.write_text(SHOWN.format(python=sys.executable).replace("exec ", "") + "sleep 10\n")
    script.chmod(0o700)
    options = ["--array=0-2", "--nodes=1", "--exclusive", "--wait", f"--output={tmp_path}/%a"]
    cluster.run(["sbatch", *options, script], env={"PYTHONPATH": CODE}, timeout=120)
    said = [(tmp_path / str(task)).read_text() for task in range(3)]
    assert [text.split()[:2] for text in said] == [["SHOWN", "local"]] * 3, said
    idle(cluster)


def test_a_cancelled_run_goes_on_and_one_out_of_time_puts_itself_back_into_the_queue(
    cluster: Cluster, submit: Submit, simulated: Path, tmp_path: Path
) -> None:
    run = tmp_path / "story-one"
    first = submit(run)
    until(lambda: trained_steps(run) >= 8)
    job = job_of(cluster, run)
    cluster.run(["scancel", job])
    out, _ = finish(first, 128 + signal.SIGTERM)
    assert f"job {job} submitted" in out
    assert "hosts: h1:2, h2:2 (Slurm job" in out
    assert f"job {job}: cancelled" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["exit_reason"] == "interrupted by SIGTERM"
    stopped = summary["steps"]
    assert (run / "checkpoints" / "last").resolve().name == f"step-{stopped:08}"

    second = submit(run)
    until(lambda: trained_steps(run) >= stopped + 8)
    job = job_of(cluster, run)
    # What Slurm does before the time limit, by the script's --signal.
    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    restarted(cluster, job, 1)
    until(lambda: trained_steps(run) >= stopped + 24)
    # And by that of others, to all processes of its steps.
    cluster.run(["scancel", "--signal=USR1", job])
    restarted(cluster, job, 2)
    out, _ = finish(second)
    assert f"going on from step {stopped} " in out
    assert out.count("going on from step") == 3
    assert f"job {job}: completed, start 3" in out
    assert trained_steps(run) == STEPS
    assert_same(cluster.controller, simulated, run)


@pytest.mark.parametrize("more", [(), ("--elastic",)], ids=["fixed", "elastic"])
def test_a_job_that_is_preempted_while_its_processes_load_goes_back_into_the_queue(
    cluster: Cluster, submit: Submit, simulated: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = tmp_path / "loading"
    process = submit(run, *more)
    until(lambda: len([*(run / "logs").glob("rank-*.log")]) == 4, every=0.05)
    time.sleep(1)  # for Python, which then loads torch
    job = job_of(cluster, run)
    urgent = ["sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    cluster.run(urgent, input="#!/bin/sh\nsleep 1\n")
    restarted(cluster, job, 1)
    out, _ = finish(process)
    assert f"job {job}: completed, start 2" in out
    assert_same(cluster.controller, simulated, run)


def test_preempted_and_its_nodes_lost_a_run_ends_at_the_same_bits(
    cluster: Cluster, hosts: list[Host], submit: Submit, simulated: Path, tmp_path: Path
) -> None:
    run = tmp_path / "story-two"
    by_name = {host.name: host for host in hosts}
    process = submit(run)
    until(lambda: trained_steps(run) >= 8)
    job = job_of(cluster, run)

    urgent = "#!/bin/sh\nsleep 1\n"
    cluster.run(
        ["sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"], input=urgent
    )
    restarted(cluster, job, 1)
    preempted = trained_steps(run)
    assert (run / "checkpoints" / "last").resolve().name == f"step-{preempted:08}"

    until(lambda: trained_steps(run) >= preempted + 8)
    assert cluster.job(job)["BatchHost"] == "h1"
    by_name["h2"].cut()
    restarted(cluster, job, 2)

    until(lambda: cluster.job(job)["JobState"] == "RUNNING")
    assert cluster.job(job)["NodeList"] == "h[1,3]"
    lost = trained_steps(run)
    until(lambda: trained_steps(run) >= lost + 8)
    by_name["h2"].fix()
    # It ends what it still has of the start that lost it, by the job's number: the next one's would be of the same.
    until(lambda: not by_name["h2"].run(["pgrep", "slurmstepd"], check=False).stdout, 120, every=0.3)
    by_name["h1"].kill()  # where the script and rank 0 are
    restarted(cluster, job, 3)

    out, _ = finish(process)
    assert cluster.job(job)["NodeList"] == "h[2-3]"
    assert f"job {job}: completed, start 4" in out
    assert trained_steps(run) == STEPS
    assert_same(cluster.controller, simulated, run)
    by_name["h1"].boot()
    start_node(cluster, by_name["h1"])


def test_what_cannot_be_submitted_is_said_in_one_line(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    for options, reason in [
        (("--slurm-partition", "nope"), "Invalid partition name specified"),
        (("--slurm-constraint", "a b"), "Invalid feature specification"),
        (("--sbatch", "--nodelist=nowhere"), "Invalid node name specified"),
    ]:
        _, err = finish(submit(tmp_path / "run", *options), 2)
        assert "sbatch refuses the job: " in err
        assert reason in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_whoever_follows_a_job_may_leave_it_at_any_time_or_at_once(
    cluster: Cluster, hosts: list[Host], submit: Submit, tmp_path: Path
) -> None:
    run = tmp_path / "it's %j #1"
    process = submit(run, "--sbatch", "--begin=now+1hour")
    assert process.stdout is not None
    assert "submitted" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, _ = finish(process, 130)
    assert "goes on." in out
    job = cluster.run(["squeue", "--noheader", "--format=%i"]).stdout.strip()
    assert f"scancel {job}" in out

    detached = tmp_path / "detached"
    finish(submit(detached, "--detach", "--sbatch", "--begin=now+1hour"))
    elsewhere = {"env": cluster.environment}
    said = hosts[2].run([*HVD_LB, "status", detached, "--json"], **elsewhere).stdout
    assert json.loads(said)["state"] == "queued"
    assert "which was waiting, is cancelled" in hosts[2].run([*HVD_LB, "stop", detached], **elsewhere).stdout
    assert cluster.run(["squeue", "--noheader", f"--name={detached.name}"]).stdout == ""
