"""An MPIJob's pods as hosts of a lab, with the tests in the operator's place: both commands of a manifest, for real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, lab
from pods import hostfile, launcher_environment, mounted_secret, worker_names
from real_runs import trained_steps, until

from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes.mpijob import mpijob
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
from hvd_lb.launch.submit.kubernetes.volumes import Volume

pytest.importorskip("horovod")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BIN = Path(sys.executable).parent
RECIPE = ("--data", "digits", "--device", "cpu", "--model", "resnet8", "--threads", "1", "--reproducible")


@contextmanager
def mount_points(*paths: str) -> Iterator[None]:
    """Empty folders to mount on, which a pod's own file system would have."""
    made = [Path(path) for path in paths if not Path(path).exists()]
    for path in made:
        path.mkdir()
    try:
        yield
    finally:
        for path in made:
            path.rmdir()


def command(job: dict[str, Any], role: str) -> list[str]:
    (container,) = job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]["containers"]
    return [word.replace("$$", "$") for word in container["command"]]


def hook(job: dict[str, Any]) -> list[str]:
    """What Kubernetes runs in a worker pod before it ends it."""
    (container,) = job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return [*container["lifecycle"]["preStop"]["exec"]["command"]]


@contextmanager
def pods(job: dict[str, Any], folder: Path) -> Iterator[tuple[Host, list[Host]]]:
    """The launcher and the workers, with what the operator mounts; the workers' command runs and answers."""
    names = worker_names(job)
    keys = job["spec"]["sshAuthMountPath"]
    mounted_secret(folder / "secret", keys)
    (folder / "config").mkdir()
    (folder / "config" / "hostfile").write_text(hostfile(job))
    with mount_points(keys, "/etc/mpi"), lab(["launcher", *(f"w{i}" for i in range(len(names)))]) as hosts:
        launcher, *workers = hosts
        with (launcher.folder.parent / "hosts").open("a") as dns:
            dns.writelines(f"{worker.address} {name}\n" for worker, name in zip(workers, names, strict=True))
        for host in hosts:
            host.put_back(Path("/etc/ssh/ssh_config"))  # the lab's way of logging in, and its sshd
            host.run(["kill", (host.folder / "sshd.pid").read_text().strip()])
            host.run(["mount", "--bind", "-o", "ro", folder / "secret", keys])
        launcher.run(["mount", "--bind", "-o", "ro", folder / "config", "/etc/mpi"])
        for worker in workers:
            until(partial(refuses, worker), 10, every=0.1)
            worker.start(command(job, "Worker"), stderr=subprocess.DEVNULL)
            until(partial(answers, worker), 10, every=0.1)
        yield launcher, workers


def answers(host: Host) -> bool:
    """The startup probe."""
    probe = "import socket; socket.create_connection(('localhost', 12345), 1)"
    return host.run([sys.executable, "-c", probe], check=False).returncode == 0


def refuses(host: Host) -> bool:
    return not answers(host)


def test_the_pods_of_a_manifest_train_and_end_with_the_simulated_weights(tmp_path: Path) -> None:
    run, simulated = tmp_path / "runs" / "digits", tmp_path / "simulated"
    run.parent.mkdir()
    arguments = ("train", *RECIPE, "--gpus", "4", "--epochs", "1", "--output", str(run))
    submission = Submission(
        arguments, "digits", "cpu", 4, 2, run, image="any", environment={"HVD_LB_NOTE": "a $b"}
    )
    volume = Volume("host", "", str(run.parent), str(run.parent))
    # As root: this machine's Python may be where nobody else can read.
    job = mpijob(submission, KubernetesOptions(namespace="vision", volumes=(volume,), root=True))
    path = f"{BIN}:{os.environ['PATH']}"
    with pods(job, tmp_path) as (launcher, _):
        environment = {**launcher_environment(job), "PATH": path}
        done = launcher.run(command(job, "Launcher"), env=environment, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{worker_names(job)[0]}:2" in done.stdout
        assert "MPIJob, /etc/mpi/hostfile" in done.stdout
        again = launcher.run(command(job, "Launcher"), env=environment, check=False)
        assert again.returncode == 0, again.stdout + again.stderr  # it says that it has finished
        plain = {"env": {"PATH": path}}
        launcher.run(
            ["hvd-lb", "simulate", *RECIPE, "--gpus", "4", "--epochs", "1", "--run", "--output", simulated],
            **plain,
        )
        assert "bitwise identical" in launcher.run(["hvd-lb", "compare", run, simulated], **plain).stdout


def test_a_worker_pod_that_is_told_to_end_ends_the_run_with_a_checkpoint_first(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "long"
    run.parent.mkdir()
    arguments = ("train", *RECIPE, "--gpus", "2", "--epochs", "200", "--output", str(run))
    volume = Volume("host", "", str(run.parent), str(run.parent))
    job = mpijob(
        Submission(arguments, "long", "cpu", 2, 1, run, image="any"),
        KubernetesOptions(volumes=(volume,), root=True),
    )
    with pods(job, tmp_path) as (launcher, workers):
        environment = {**launcher_environment(job), "PATH": f"{BIN}:{os.environ['PATH']}"}
        pipe = subprocess.PIPE
        process = launcher.start(command(job, "Launcher"), env=environment, stdout=pipe, stderr=pipe)
        until(lambda: trained_steps(run) >= 3 or process.poll() is not None, 300)
        # In a pod sshd is the first process.
        (sshd,) = workers[1].run(["pgrep", "-o", "-f", "sshd.*-p 12345"]).stdout.split()
        *words, first = hook(job)
        assert first == "1"
        done = workers[1].run([*words, sshd], timeout=200)
        assert done.returncode == 0
        out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + 15, out + err
    assert "with a checkpoint; the same command goes on there" in out
    assert list((run / "checkpoints").glob("step-*"))
