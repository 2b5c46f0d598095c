"""Commands that are submitted: what is forwarded, what is refused."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import Start, finish

from hvd_lb_cli.arguments import forwarded_arguments, without_secrets
from hvd_lb_cli.train import train

Run = Callable[..., Any]
DROPPED = {"hosts", "dry_run", "data"}


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("train --gpus 4 --hosts h1:2,h2:2 --reproducible", "train --gpus 4 --reproducible"),
        ("train --hosts=h1:2 --gpus=4", "train --gpus=4"),
        ("train --dry-run --gpus 4 --no-nesterov", "train --gpus 4 --no-nesterov"),
        # A value that looks like an option is a value.
        ("train --output --hosts --gpus 4", "train --output --hosts --gpus 4"),
        ("train --env --dry-run --data '--gpus' --epochs 3", "train --env --dry-run --epochs 3"),
        ("train --recipe 'a b;$(x)'", "train --recipe 'a b;$(x)'"),
    ],
)
def test_options_that_say_where_are_left_out(line: str, kept: str) -> None:
    assert forwarded_arguments(shlex.split(line), train, DROPPED) == shlex.split(kept)


def test_values_of_variables_are_not_shown() -> None:
    line = "train --env A=b=c --env B --env=C=d --recipe r=s"
    assert without_secrets(line.split()) == [
        "train",
        "--env",
        "A",
        "--env",
        "B",
        "--env=C",
        "--recipe",
        "r=s",
    ]


@pytest.fixture
def typed(hvd_lb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """typed("train", …, status=2) in an empty folder, which stays empty, and outside of any cluster's job."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "LSB_", "HVD_LB_"))]:
        monkeypatch.delenv(name)

    def run(*arguments: object, status: int = 0) -> Any:
        said = hvd_lb(*arguments)
        assert said.status == status, said
        assert list(tmp_path.iterdir()) == []
        return said

    return run


def test_a_slurm_script_has_the_users_command_with_paths_that_hold_anywhere(
    typed: Run, tmp_path: Path
) -> None:
    command = ("train", "--gpus", 16, "--data", "digits", "--launcher", "slurm", "--per-node", 4)
    script = typed(*command, "--output", "runs/a b", "--slurm-partition", "gpu").out
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=4\n" in script
    line = next(line for line in script.splitlines() if " train " in line)
    inner = shlex.split(line.rstrip("& "))[4:]
    told = ["--data", "digits", "--device", "cuda", "--output", f"{tmp_path}/runs/a b"]
    assert inner == ["train", "--gpus", "16", *told, "--launcher", "slurm"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_validation_images_are_named_so_that_they_are_found_there(typed: Run, tmp_path: Path) -> None:
    command = (
        "train",
        "--gpus",
        16,
        "--data",
        "set",
        "--val",
        "other/val",
        "--output",
        "/runs/a",
        "--launcher",
    )
    script = typed(*command, "slurm").out
    assert f" --data {tmp_path}/set " in script
    assert f" --val {tmp_path}/other/val " in script
    kubernetes = (
        *command,
        "kubernetes",
        "--k8s-volume",
        f"pvc:data:{tmp_path}",
        "--k8s-volume",
        "pvc:runs:/runs",
    )
    assert "--val other/val: containers have only the folder of --data" in typed(*kubernetes, status=2).err
    assert "--val" in typed(*(of if of != "other/val" else "set/valid" for of in kubernetes)).out


def test_other_paths_hold_anywhere_or_are_refused(typed: Run, tmp_path: Path) -> None:
    command = ("train", "--gpus", 16, "--data", "digits", "--output", "out/run")
    paths = ("--resume", "out/run/checkpoints/best", "--timeline=trace.json")
    script = typed(*command, *paths, "--launcher", "slurm").out
    assert f" --resume {tmp_path}/out/run/checkpoints/best --timeline {tmp_path}/trace.json " in script
    assert "--resume" not in typed(*command, "--resume", "auto", "--launcher", "slurm").out
    mounts = ("--launcher", "slurm", "--container-image", "x", "--container-mount", "scratch")
    assert f" --container-mount {tmp_path}/scratch" in typed(*command, *mounts).out
    kubernetes = (*command, "--launcher", "kubernetes", "--k8s-volume", f"pvc:runs:{tmp_path}/out")
    assert f"--timeline {tmp_path}/trace.json: containers have" in typed(*kubernetes, *paths, status=2).err
    assert f"{tmp_path}/out/run/trace.json" in typed(*kubernetes, "--timeline", "out/run/trace.json").out


def test_the_same_command_names_the_same_run(typed: Run) -> None:
    command = ("train", "--gpus", 16, "--data", "digits", "--launcher", "slurm")
    first, again, other = (
        typed(*line).out for line in (command, (*command, "--slurm-time", "1:00"), (*command, "--seed", 1))
    )
    name = [next(line for line in text.splitlines() if "job-name" in line) for text in (first, again, other)]
    assert name[0] == name[1] != name[2]


def test_an_mpijob_of_the_published_image(typed: Run) -> None:
    command = ("train", "--gpus", 16, "--data", "digits", "--launcher", "kubernetes", "--env", "TOKEN=t")
    volume = ("--k8s-volume", "pvc:runs:/runs", "--output", "/runs/a")
    job = yaml.safe_load(typed(*command, *volume).out)
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    assert launcher["image"].startswith("ghcr.io/hvd-lb/hvd-lb:0.")
    assert launcher["command"][:4] == ["hvd-lb", "train", "--gpus", "16"]
    assert "TOKEN=t" not in launcher["command"]
    assert {"name": "TOKEN", "value": "t"} in launcher["env"]


def test_containers_over_ssh_are_told_before_any_is_started(typed: Run) -> None:
    command = (
        "train",
        "--data",
        "digits",
        "--device",
        "cpu",
        "--hosts",
        "h1:2,h2:2",
        "--image",
        "i",
        "--dry-run",
    )
    first, second, inner = typed(*command, "--env", "TOKEN=t").out.splitlines()
    assert first.startswith("ssh ")
    assert " h1 " in first
    assert " h2 " in second
    assert inner.startswith("hvd-lb train --data digits --device cpu --output")
    assert "TOKEN=t" not in first + second + inner


@pytest.mark.slow
def test_a_detached_submission_is_submitted_once_and_not_followed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\ncat >> '{tmp_path}/script'\necho 7\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    command = ("train", "--data", "digits", "--gpus", 8, "--launcher", "slurm", "--detach", "--output", run)
    _, err = finish(start(*command), 2)
    assert err == (
        "hvd-lb: error: --detach has nothing to leave where a job is only printed: give --submit as well\n"
    )
    assert not run.exists()
    out, err = finish(start(*command, "--submit"))
    assert out.splitlines() == [
        f"job 7 submitted; its log is {run}/logs/slurm-7.out",
        f"see how it is:           hvd-lb status {run}",
        f"follow it:               tail -F {run}/logs/slurm-7.out",
        f"end with a checkpoint:   hvd-lb stop {run}, or scancel 7",
    ]
    assert err == ""
    script = (tmp_path / "script").read_text()
    assert script.count("#!/bin/bash") == 1
    assert "--detach" not in script


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--launcher", "slurm", "--data", "digits"), "--gpus is left out"),
        (("--launcher", "kubernetes", "--data", "digits", "--gpus", 8), "--output"),
        (
            (
                "--launcher",
                "slurm",
                "--gpus",
                8,
                "--data",
                "digits",
                "--image",
                "x",
                "--container-image",
                "y",
            ),
            "give one of them",
        ),
        (("--launcher", "slurm", "--gpus", 8, "--data", "digits", "--hosts", "h1"), "finds its own hosts"),
        (("--launcher", "slurm", "--gpus", 8, "--data", "digits", "--model", "nope"), "nope"),
        (("--launcher", "ssh", "--gpus", 8, "--data", "digits"), "give --hosts"),
        (("--launcher", "local", "--hosts", "h1"), "finds its own hosts"),
        (("--hosts", "h1", "--hostfile", "f"), "give one of them"),
        (("--image", "x", "--data", "digits"), "name them with --hosts"),
        (("--image", "x", "--data", "digits", "--hosts", "h1,h2"), "h1:8"),
        (("--submit", "--data", "digits"), "--submit submits a job"),
        (
            ("--container-image", "x", "--data", "digits"),
            "--container-image has no meaning for a run that is started on this",
        ),
        (("--ssh-port", 22, "--data", "digits"), "--ssh-port has no meaning"),
        (
            ("--k8s-queue", "q", "--data", "digits", "--hosts", "h1"),
            "--k8s-queue has no meaning for a run that is started over",
        ),
        (("--launcher", "kubernetes", "--slurm-time", "1:00", "--gpus", 8), "--slurm-time has no meaning"),
        (("--container-port", 2222, "--data", "digits", "--hosts", "h1"), "--container-port has no meaning"),
        (("--env", "a b=c", "--data", "digits"), "NAME=VALUE"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    typed: Run, arguments: tuple[object, ...], said: str
) -> None:
    done = typed("train", "--device", "cpu", *arguments, status=2)
    assert said in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_an_elastic_job_does_not_end_with_a_node(typed: Run) -> None:
    words = ("--data", "digits", "--gpus", 4, "--device", "cpu", "--launcher", "slurm")
    out = typed("train", *words, "--elastic", "--min-processes", 2).out
    assert "#SBATCH --no-kill\n" in out
    assert " --elastic --min-processes 2 " in out
    assert "--no-kill" not in typed("train", *words).out
