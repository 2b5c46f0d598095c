"""The command lines of `--image`, exactly, and what the failures of Docker and ssh are told as."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from hvd_lb.launch.options import LaunchOptions
from hvd_lb.launch.starters.ssh import on_host
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.docker import commands as docker_run
from hvd_lb.launch.submit.docker.check import judge, probe_command
from hvd_lb.launch.submit.docker.commands import (
    container_name,
    explain,
    inner_command,
    known_host,
    run_command,
)
from hvd_lb.launch.submit.docker.submit import describe

PLAIN = Submission(
    arguments=("train", "--data", "/data/imagenet", "--gpus", "16", "--output", "/home/ada/runs/one"),
    name="one",
    device="cuda",
    processes=16,
    per_node=8,
    output=Path("/home/ada/runs/one"),
    data=Path("/data/imagenet"),
    image="ghcr.io/hvd-lb/hvd-lb:0.1.0",
    environment={"TOKEN": "secret"},
)
HOSTILE = "a b'\"$(touch pwned);`touch pwned`,*\\ü"
SSH = ["ssh", "-o", "BatchMode=yes"]


def words(text: str) -> list[str]:
    return text.split()


def test_what_starts_a_container() -> None:
    command = run_command(PLAIN, "42", "h1")
    assert command == [
        "sh",
        "-c",
        docker_run._PREPARE + docker_run.FIND_GPUS + docker_run._ASK_FOR_GPUS + docker_run._RUN,
        "sh",
        "/home/ada/runs/one",
        *words("--rm --interactive --name hvd-lb-42-h1 --label hvd-lb.run=42 --network host --shm-size 8g"),
        *words(
            "--ulimit memlock=-1 --ulimit stack=67108864 --security-opt no-new-privileges --log-driver none"
        ),
        *("--mount", "type=bind,source=/home/ada/runs/one,target=/home/ada/runs/one"),
        *("--mount", "type=bind,source=/data/imagenet,target=/data/imagenet,readonly"),
        *words("--entrypoint hvd-lb-entry ghcr.io/hvd-lb/hvd-lb:0.1.0"),
        *words("python -m hvd_lb.launch.submit.docker.host"),
    ]


def test_on_the_cpu_no_gpus_are_asked_for_and_named_data_needs_no_folder() -> None:
    command = run_command(replace(PLAIN, device="cpu", data=None), "42", "h1")
    assert "gpu" not in command[2]
    assert command.count("--mount") == 1


def test_a_recipe_file_is_taken_along() -> None:
    command = run_command(replace(PLAIN, recipe=Path("/home/ada/my.yaml")), "42", "h1")
    assert "type=bind,source=/home/ada/my.yaml,target=/home/ada/my.yaml,readonly" in command


def test_the_run_inside() -> None:
    assert inner_command(replace(PLAIN, container_port=2222), [("h1", 8), ("h2", 8)]) == [
        *words("hvd-lb train --data /data/imagenet --gpus 16 --output /home/ada/runs/one"),
        *words("--launcher ssh --hosts h1:8,h2:8 --ssh-port 2222 --strict-host-keys"),
    ]


def test_nothing_secret_is_on_a_command_line() -> None:
    lines = describe(PLAIN, [("h1", 8), ("h2", 8)], partial(on_host, SSH))
    assert len(lines) == 3
    assert not [line for line in lines if "secret" in line or "TOKEN" in line]


def test_a_dry_run_can_be_copied() -> None:
    first, inside = describe(PLAIN, [("h1", 8)], partial(on_host, SSH))
    assert shlex.split(inside) == inner_command(PLAIN, [("h1", 8)])
    ssh, *options, host, command = shlex.split(first)
    assert [ssh, *options, host] == [*SSH, "h1"]
    assert shlex.split(command) == run_command(PLAIN, "dry-run", "h1")


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of docker a program that writes its arguments to this file."""
    seen = tmp_path / "seen"
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(
        "#!/usr/bin/env python3\nimport json, sys\n"
        f"json.dump(sys.argv[1:], open({str(seen)!r}, 'w'), ensure_ascii=False)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize("remote", [False, True], ids=["here", "there"])
def test_hostile_names_reach_docker_as_they_are(docker: Path, tmp_path: Path, remote: bool) -> None:
    output, data = tmp_path / HOSTILE / "runs", Path(f"/{HOSTILE}/data")
    submission = replace(PLAIN, output=output, data=data, image=HOSTILE)
    command = run_command(submission, "42", HOSTILE)
    if remote:  # what sshd does with the words behind the host's name
        command = ["sh", "-c", shlex.join(command)]
    subprocess.run(command, check=True)
    seen = json.loads(docker.read_text())
    assert output.is_dir()
    assert not list(tmp_path.rglob("pwned"))
    assert HOSTILE in seen
    mounts = [
        next(csv.reader([value])) for flag, value in zip(seen, seen[1:], strict=False) if flag == "--mount"
    ]
    assert mounts == [
        ["type=bind", f"source={output}", f"target={output}"],
        ["type=bind", f"source={data}", f"target={data}", "readonly"],
    ]


def test_a_name_is_one_for_docker_too() -> None:
    assert container_name("42", "fe80::1%eth0") == "hvd-lb-42-fe80--1-eth0"


def test_known_hosts_name_the_port() -> None:
    assert known_host("h1", 12345, "ssh-ed25519 AAAA") == "[h1]:12345 ssh-ed25519 AAAA"
    assert known_host("h1", 22, "ssh-ed25519 AAAA") == "h1 ssh-ed25519 AAAA"


# What Docker 20.10, 28 and 29, OpenSSH and the host process really say.
FAILURES = [
    (127, "sh: 1: exec: docker: not found", "no docker there: install Docker Engine"),
    (
        125,
        "docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n"
        "\nRun 'docker run --help' for more information",
        "the Docker daemon does not run: systemctl start docker",
    ),
    (
        125,
        "docker: Got permission denied while trying to connect to the Docker daemon socket at "
        'unix:///var/run/docker.sock: Post "http://…/containers/create": dial unix: connect: permission denied.',
        "no permission to use Docker: add the user to the group `docker`",
    ),
    (
        125,
        "Unable to find image 'nope:latest' locally\ndocker: Error response from daemon: pull access denied for nope, "
        "repository does not exist or may require 'docker login'.\nSee 'docker run --help'.",
        "no image ghcr.io/hvd-lb/hvd-lb:0.1.0 there and none to pull: check its name, or `docker pull` or `docker "
        "load` it there (pull access denied for nope, repository does not exist or may require 'docker login'.)",
    ),
    (
        125,
        'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
        "Docker cannot give it GPUs: install the NVIDIA Container Toolkit and driver, or use --device cpu "
        '(could not select device driver "" with capabilities: [[gpu]].)',
    ),
    (
        125,
        'docker: Error response from daemon: error gathering device information while adding custom device '
        '"nvidia.com/gpu=all": no such file or directory',
        "Docker there uses no CDI devices: set the feature `cdi` in /etc/docker/daemon.json, or install the NVIDIA "
        'Container Toolkit\'s runtime (error gathering device information while adding custom device '
        '"nvidia.com/gpu=all": no such file or directory)',
    ),
    (
        125,
        "docker: Error response from daemon: invalid mount config for type \"bind\": bind source path does not exist: "
        "/data/imagenet.\nSee 'docker run --help'.",
        "no /data/imagenet there: it has to be at the same path on all hosts",
    ),
    (
        1,
        "mkdir: cannot create directory ‘/home/ada’: Permission denied",
        "the output folder cannot be made: mkdir: cannot create directory ‘/home/ada’: Permission denied",
    ),
    (
        127,
        'docker: Error response from daemon: failed to create shim: OCI runtime create failed: exec: "hvd-lb-entry": '
        "executable file not found in $PATH: unknown.",
        "ghcr.io/hvd-lb/hvd-lb:0.1.0 is no image of hvd-lb",
    ),
    (
        1,
        "hvd-lb: port 12345 cannot be listened on: Address already in use",
        "port 12345 is in use there: is another run on that host? `docker ps --filter label=hvd-lb.run` shows it",
    ),
    (255, "Connection to h2 closed.", "its ssh connection failed: Connection to h2 closed."),
    (255, "", "its ssh connection failed: no reason given"),
    (137, "", "its container was killed by hand, or for memory"),
    (3, "", "its container ended with exit code 3"),
    (1, "hvd-lb: sshd ended by itself with exit code -9", "sshd ended by itself with exit code -9"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "said", "meaning"), FAILURES, ids=range(len(FAILURES)))
def test_every_failure_is_one_line_and_says_what_to_do(status: int, said: str, meaning: str) -> None:
    assert explain(PLAIN, status, said.splitlines()) == meaning


def test_a_submission_without_an_image_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="without an image"):
        docker_run.run_command(replace(PLAIN, image=None), "42", "h1")


def answer(out: str, err: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], status, out, err)


SERVER = "server 28.1.0\n"


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        (answer(SERVER + "gpus NVIDIA runtime\n"), None),
        (answer(SERVER + "gpus CDI devices\n"), None),
        (answer(SERVER), "Docker there has neither NVIDIA's runtime nor its CDI devices"),
        (answer(SERVER + "gpus NVIDIA runtime\nmissing /data/x\n"), "no readable /data/x there"),
        (answer("", "sh: 1: docker: not found", 127), "no docker there: install Docker Engine"),
        (
            answer("", "permission denied while trying to connect to the Docker daemon socket", 1),
            "no permission to use Docker: add the user to the group `docker`",
        ),
        (
            answer("", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", 1),
            "does not run",
        ),
        (answer("", "me@h1: Permission denied (publickey).", 255), "key refused"),
        (None, "no answer in time"),
    ],
)
def test_what_a_host_lacks_for_containers_is_found_before_any_is_started(
    run: subprocess.CompletedProcess[str] | None, wrong: str | None
) -> None:
    findings = list(judge("h1", run, PLAIN, LaunchOptions()))
    found = [finding.detail for finding in findings if finding.state != "ok"]
    assert (wrong is None) == (not found)
    assert wrong is None or wrong in found[0]


def test_the_shell_that_asks_takes_any_path_as_it_is(tmp_path: Path) -> None:
    there = tmp_path / "a 'b'; $(touch pwned)"
    there.mkdir()
    (tmp_path / "docker").write_text("#!/bin/sh\necho server 1\n")
    (tmp_path / "docker").chmod(0o755)
    run = replace(PLAIN, data=there, recipe=tmp_path / "no; touch pwned")
    path = f"{tmp_path}:{os.environ['PATH']}"
    did = subprocess.run(
        probe_command(run), cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, check=True
    )
    assert [line for line in did.stdout.splitlines() if "missing" in line] == [f"missing {run.recipe}"]
    assert not (tmp_path / "pwned").exists()


# What `docker info` says as JSON where NVIDIA's runtime is configured, where CDI devices are known, and elsewhere.
INFO = {
    "runtime": {"Runtimes": {"nvidia": {"path": "x"}, "runc": {"path": "runc"}}},
    "cdi": {"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=all"}]},
    "none": {"Runtimes": {"runc": {"path": "runc"}}},
}


@pytest.mark.parametrize(
    ("info", "device", "asked", "found"),
    [
        ("runtime", "cuda", ["--gpus", "all"], ["gpus NVIDIA runtime"]),
        ("cdi", "cuda", ["--device", "nvidia.com/gpu=all"], ["gpus CDI devices"]),
        ("none", "cuda", ["--gpus", "all"], []),  # then Docker says what is missing
        ("cdi", "cpu", [], ["gpus CDI devices"]),
    ],
)
def test_gpus_are_asked_for_in_the_way_that_docker_has(
    docker: Path,
    tmp_path: Path,
    info: str,
    device: Literal["cpu", "cuda"],
    asked: list[str],
    found: list[str],
) -> None:
    program = tmp_path / "bin" / "docker"
    program.write_text(
        f"#!/usr/bin/env python3\nimport json, sys\ninfo, words = {INFO[info]!r}, sys.argv[1:]\n"
        "if words[0] == 'info': print(json.dumps(info['Runtimes'] if '.Runtimes' in words[2] else info))\n"
        "elif words[0] == 'version': print('server 1')\n"
        f"else: json.dump(words, open({str(docker)!r}, 'w'))\n"
    )
    submission = replace(PLAIN, device=device, output=tmp_path / "runs", data=None)
    subprocess.run(run_command(submission, "42", "h1"), check=True)
    seen = json.loads(docker.read_text())
    given = [word for word in seen if word in ("--gpus", "all", "--device", "nvidia.com/gpu=all")]
    assert given == asked
    said = subprocess.run(probe_command(submission), capture_output=True, text=True, check=True).stdout
    assert [line for line in said.splitlines() if line.startswith("gpus")] == found


def test_inside_one_has_the_groups_that_one_has_outside(docker: Path, tmp_path: Path) -> None:
    """A file that is readable through a group stays so."""
    (tmp_path / "bin" / "id").write_text(
        "#!/bin/sh\ncase $1 in -G) echo 100 2001 2002;; *) echo 100;; esac\n"
    )
    (tmp_path / "bin" / "id").chmod(0o755)
    subprocess.run(
        run_command(replace(PLAIN, device="cpu", output=tmp_path / "runs"), "42", "h1"), check=True
    )
    seen = json.loads(docker.read_text())
    groups = [value for flag, value in zip(seen, seen[1:], strict=False) if flag == "--group-add"]
    assert sorted(groups) == ["100", "2001", "2002"]
    assert seen[seen.index("--user") + 1] == "100:100"
