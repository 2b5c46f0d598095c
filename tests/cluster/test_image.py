"""The real Dockerfile built by a real engine, alone and as three hosts of one run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_runs import events, ranks_of
from engine import IMAGE, Engine, engine
from hosts import Host, lab
from real_runs import trained_steps, until
from slurm import slurm

from hvd_lb.launch.submit.kubernetes.mpijob import SSH_PORT, sshd_command

pytestmark = [pytest.mark.cluster, pytest.mark.image, pytest.mark.slow, pytest.mark.timeout(1800)]

UID = 4321  # of nobody in the image
PORT = 2222  # the lab's own sshd has 12345
DIGITS = ["--data", "digits", "--gpus", "6", "--per-gpu-batch", "8", "--device", "cpu", "--reproducible"]

# Any command in containers on all hosts, where `train --image` runs hvd-lb.
IN_CONTAINERS = """
import sys
from functools import partial
from pathlib import Path
from hvd_lb.launch.submit.docker.group import DockerContainers
from hvd_lb.launch.starters.ssh import on_host
from hvd_lb.launch.submit.command import Submission
image, port, output, *command = sys.argv[1:]
submission = Submission(
    (), "", "cpu", 3, 1, Path(output), image=image, container_port=int(port), environment={"TOKEN": "secret"}
)
with DockerContainers(submission, ["h1", "h2", "h3"], partial(on_host, ["ssh"])) as containers:
    sys.exit(containers.run(command))
"""


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    with engine() as docker:
        yield docker


@pytest.fixture(scope="module")
def image(docker: Engine) -> str:
    return docker.build_image()


@pytest.fixture(scope="module")
def hosts(docker: Engine, image: str) -> Iterator[list[Host]]:
    """The user's desk, and three with Docker."""
    with lab(["desk", "h1", "h2", "h3"]) as hosts, docker.on(hosts[1:], user=f"{UID}:{UID}"):
        hosts[0].know(*hosts)
        yield hosts


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder of the user's own; containers are on the way to it as well."""
    for folder in tmp_path.parents[:3]:
        folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    path = tmp_path / "run"
    path.mkdir()
    os.chown(path, UID, UID)
    return path


def inside(docker: Engine, image: str, command: str) -> str:
    """What a shell says in a container of another user than the image's."""
    user = f"--user={UID}:{UID}"
    run = ("run", "--rm", "--network=none", user, "--entrypoint=hvd-lb-entry", image, "bash", "-c", command)
    return docker(*run).stdout


def train(output: Path, *more: object, hosts: str = "h1:2,h2:2,h3:2", image: str = IMAGE) -> list[object]:
    """The command line of a small run in containers; of two options the last one counts."""
    return [
        *(sys.executable, "-m", "hvd_lb_cli.main", "train", *DIGITS, "--output", output),
        *("--hosts", hosts, "--image", image, "--container-port", PORT, *more),
    ]


def test_the_image_is_in_order(docker: Engine, image: str) -> None:
    said = docker("run", "--rm", "--network=none", image, "doctor").stdout
    for line in ("ok      Horovod ", "Gloo, MPI", "NCCL, Gloo, MPI", "ok      DALI", "ok      Open MPI"):
        assert line in said


def test_any_user_trains_and_owns_what_was_written(docker: Engine, image: str, output: Path) -> None:
    train = f"train --data digits --gpus 2 --device cpu --epochs 1 --output {output}"
    user = f"--user={UID}:{UID}"
    docker(
        "run",
        "--rm",
        "--network=host",
        user,
        f"--volume={output}:{output}",
        image,
        *train.split(),
        timeout=300,
    )
    assert json.loads((output / "summary.json").read_text())["exit_reason"] == "finished"
    assert {path.stat().st_uid for path in output.rglob("*")} == {UID}


def test_every_user_has_a_name_and_a_home(docker: Engine, image: str) -> None:
    assert inside(docker, image, "id -un; id -u; echo $HOME; touch ~/x") == f"hvd-lb\n{UID}\n/home/hvd-lb\n"
    ids = ("run", "--rm", "--network=none", "--entrypoint=id", image, "-un")
    assert docker(*ids).stdout == "hvd-lb\n"


def test_nothing_is_in_it_that_does_not_belong_there(docker: Engine, image: str) -> None:
    compilers = "cc gcc g++ c++ clang cpp ld as make cmake nvcc"
    assert inside(docker, image, f"for name in {compilers}; do command -v $name; done; true") == ""
    places = "/usr/include /var/cache /var/lib/apt/lists /var/log /tmp /home/hvd-lb"
    assert inside(docker, image, f"find {places} -mindepth 1 | grep -v ^/var/log$; true") == ""
    assert inside(docker, image, "ls -d /root/.cache /src /etc/ssh/ssh_host_*; true") == ""
    assert inside(docker, image, "find / -xdev -type f -perm /6000 2>/dev/null; true") == ""
    assert (
        inside(docker, image, "find /opt /usr -name '*_static.a' -o -name cuda_runtime.h -o -name Python.h")
        == ""
    )


def test_it_says_what_it_is(docker: Engine, image: str) -> None:
    config = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["hvd-lb-entry", "hvd-lb"]


def test_pods_of_an_mpijob_check_each_others_keys(docker: Engine, image: str, output: Path) -> None:
    """As the operator has it: one key pair for all pods, which is the workers' host key as well, and a hostfile."""
    (output / "hostfile").write_text("localhost slots=1\n")
    keys = "/home/hvd-lb/.ssh"
    make = f"mkdir -m 700 {keys}; ssh-keygen -q -N '' -f {keys}/id_rsa; cp {keys}/id_rsa.pub {keys}/authorized_keys"
    sshd = shlex.join(sshd_command(keys))
    ask = f"ssh -p {SSH_PORT} -o BatchMode=yes localhost id -u"
    script = f"{make}; {sshd} 2>/dev/null & sleep 3; {ask} && ls {keys}"
    mount = f"{output}/hostfile:/etc/mpi/hostfile:ro"
    shell = ("--network", "host", "--entrypoint", "hvd-lb-entry", image, "bash", "-c", script)
    did = docker("run", "--rm", "-v", mount, *shell)
    assert did.stderr == ""
    assert did.stdout.split() == ["1000", "authorized_keys", "id_rsa", "id_rsa.pub"], (
        "no known_hosts was needed"
    )


def test_containers_reach_each_other_with_the_environment_they_were_given(
    docker: Engine, image: str, hosts: list[Host], output: Path
) -> None:
    ask = "id -u; echo $TOKEN; which hvd-lb"
    strictly = f"ssh -p {PORT} -o StrictHostKeyChecking=yes"
    script = f"for host in h1 h2 h3; do {strictly} $host {shlex.quote(ask)}; done; exit 7"
    command = [sys.executable, "-c", IN_CONTAINERS, image, PORT, output, "bash", "-c", script]
    did = hosts[0].run(command, check=False)
    assert (did.returncode, did.stdout, did.stderr) == (7, f"{UID}\nsecret\n/opt/hvd-lb/bin/hvd-lb\n" * 3, "")
    assert docker.containers() == []


def test_three_containers_are_the_hosts_of_one_run(docker: Engine, hosts: list[Host], output: Path) -> None:
    """The weights are bitwise those of one process, here, without any container."""
    did = hosts[0].run(train(output, "--steps", 8), timeout=600)
    assert "ended: stopped at --steps" in did.stdout
    assert {path.stem.split("-")[-1] for path in (output / "logs").glob("rank-*.log")} == {"h1", "h2", "h3"}
    assert {path.stat().st_uid for path in output.rglob("*")} == {UID}
    assert docker.containers() == []
    alone = output.with_name("alone")
    simulate = [
        sys.executable,
        "-m",
        "hvd_lb_cli.main",
        "simulate",
        *DIGITS,
        "--steps=8",
        f"--output={alone}",
    ]
    subprocess.run(simulate, check=True, capture_output=True)
    weights = [folder / "checkpoints" / "last" / "model.safetensors" for folder in (output, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_interrupt_ends_it_with_a_checkpoint_and_the_same_command_goes_on(
    docker: Engine, hosts: list[Host], output: Path
) -> None:
    going = hosts[0].start(train(output, "--epochs", 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: trained_steps(output) > 2 or going.poll() is not None, 300)
    going.send_signal(signal.SIGINT)
    said, _ = going.communicate(timeout=120)
    assert going.returncode == 128 + signal.SIGINT, said
    assert "with a checkpoint; the same command goes on there" in said
    assert docker.containers() == []
    assert "going on from step" in hosts[0].run(train(output, "--epochs", 1), timeout=600).stdout


def test_an_elastic_run_goes_on_without_a_rank_and_without_a_container(
    docker: Engine, hosts: list[Host], output: Path
) -> None:
    """The weights are those of one process. A rank is replaced; a container is not, and the head goes on looking."""
    elastic = ("--epochs", 4, "--elastic", "--log-every", 1)
    going = hosts[0].start(train(output, *elastic), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: trained_steps(output) > 2 or going.poll() is not None, 300)
    os.kill(ranks_of(output)[5], signal.SIGKILL)
    until(lambda: [change for change in events(output) if change["joined"]] or going.poll() is not None, 120)
    docker("kill", *(name for name in docker.containers() if name.endswith("-h3")))
    said, _ = going.communicate(timeout=600)
    assert going.returncode == 0, said
    assert "h3 is lost (" in said
    assert events(output)[-1]["processes"] == 4
    assert docker.containers() == []
    alone = output.with_name("alone")
    one = ("train", *DIGITS, "--epochs", "4", "--processes", "1", "--output", str(alone))
    subprocess.run([sys.executable, "-m", "hvd_lb_cli.main", *one], check=True, capture_output=True)
    weights = [folder / "checkpoints" / "last" / "model.safetensors" for folder in (output, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_killed_launcher_leaves_no_container(docker: Engine, hosts: list[Host], output: Path) -> None:
    going = hosts[0].start(
        train(output, "--epochs", 100), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: trained_steps(output) > 2 or going.poll() is not None, 300)
    assert len(docker.containers()) == 3
    going.kill()
    until(lambda: docker.containers() == [], 90)
    assert (output / "checkpoints" / "last").exists()  # its training was asked to end, not cut off


def test_a_cut_network_leaves_no_container(
    docker: Engine, image: str, hosts: list[Host], output: Path
) -> None:
    """The launcher is alive, but nobody hears it any more: that is what the host process is for."""
    desk = hosts[0]
    going = desk.start([sys.executable, "-c", IN_CONTAINERS, image, PORT, output, "sleep", "1000"])
    until(lambda: len(docker.containers()) == 3, 60)
    desk.cut()
    until(lambda: docker.containers() == [], 240, every=1)
    desk.fix()
    going.kill()


FAILURES = {
    "desk: the Docker daemon does not run: systemctl start docker": {"hosts": "h1:1,desk:1"},
    "nowhere: no such host: check its name": {"hosts": "h1:1,nowhere:1"},
    "h1: no image localhost/none there and none to pull": {"hosts": "h1:1", "image": "localhost/none"},
    "h1: Docker there has neither NVIDIA's runtime nor its CDI devices; install the NVIDIA Container Toolkit": {
        "more": ["--device", "cuda"]
    },
    "h1: no readable /no/data there; it has to be at the same path": {"more": ["--data", "/no/data"]},
    "h1: the output folder cannot be made: mkdir: cannot create": {"more": ["--output", "/proc/no"]},
    "h1: port 12345 is in use there: is another run": {"more": ["--container-port", "12345"]},
}


@pytest.mark.parametrize("meaning", FAILURES)
def test_what_is_wrong_is_said_of_its_host(
    docker: Engine, hosts: list[Host], output: Path, meaning: str
) -> None:
    changes: dict[str, Any] = {"hosts": "h1:6", **FAILURES[meaning]}
    did = hosts[0].run(train(output, *changes.pop("more", ()), **changes), check=False)
    assert did.returncode == 2
    assert meaning in did.stderr
    assert docker.containers() == []


def test_doctor_looks_for_docker_on_all_hosts_and_starts_nothing(hosts: list[Host], output: Path) -> None:
    doctor = [sys.executable, "-m", "hvd_lb_cli.main", "doctor", "--device", "cpu", "--image", IMAGE]
    did = hosts[0].run([*doctor, "--hosts", "h1,h2", "--data", output])
    assert did.stdout.splitlines()[-1] == "ready: h1, h2: containers"
    assert f"data: {output}" in did.stdout
    did = hosts[0].run([*doctor, "--hosts", "h1,desk"], check=False)
    assert did.returncode == 1
    assert "wrong   desk  Docker: the Docker daemon does not run: systemctl start docker" in did.stdout


def test_containers_on_the_nodes_of_a_slurm_job_need_no_ssh_between_them(
    docker: Engine, image: str, output: Path, tmp_path: Path
) -> None:
    with lab(["n1", "n2"]) as nodes, docker.on(nodes, user=f"{UID}:{UID}"):
        for node in nodes:
            node.refuse_key()
        with slurm(nodes[0], dict.fromkeys(nodes, 2)) as cluster:
            command = [sys.executable, "-m", "hvd_lb_cli.main", "train", *DIGITS, "--steps", "8"]
            in_containers = ["--image", image, "--container-port", PORT, "--output", output]
            did = cluster.run(["salloc", "--nodes=2", "--ntasks=4", *command, *in_containers], timeout=300)
            assert "hosts: n1:2, n2:2 (--hosts), by ssh" in did.stdout
            assert docker.containers() == []
            alone = [*command[:3], "simulate", *command[4:], "--output", tmp_path / "alone"]
            subprocess.run(list(map(str, alone)), check=True, capture_output=True)
            weights = "checkpoints/last/model.safetensors"
            assert (output / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()

            # As a batch job that is cancelled: a checkpoint, and no container is left. Who submits it is root here and
            # the containers' user is not, so the folder for both is made beforehand.
            for folder in (output / "batch", output / "batch" / "logs"):
                folder.mkdir()
                os.chown(folder, UID, UID)
            submit = ["--epochs", 100, "--launcher", "slurm", "--per-node", 2, "--processes", 4, "--submit"]
            again = [*command[:-2], "--seed", 1, *in_containers[:-1], output / "batch", *submit]
            going = nodes[0].start(again, env=cluster.environment, stdout=subprocess.PIPE)
            until(lambda: trained_steps(output / "batch") > 2 or going.poll() is not None, 300)
            assert going.poll() is None, going.communicate()
            assert len(docker.containers()) == 2
            cluster.run(["scancel", "--user=root"])
            going.communicate(timeout=120)
            until(lambda: docker.containers() == [], 120)
            assert (output / "batch" / "checkpoints" / "last").exists()
