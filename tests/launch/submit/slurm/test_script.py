"""The batch script, exactly; and what sbatch is not to be told. tests/cluster runs such scripts."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.slurm.follow import submit
from hvd_lb.launch.submit.slurm.script import SlurmOptions, log_file, script

RUN = Submission(
    arguments=("train", "--data", "/data/imagenet", "--gpus", "256", "--output", "/runs/imagenet"),
    name="imagenet",
    device="cuda",
    processes=256,
    per_node=8,
    output=Path("/runs/imagenet"),
    data=Path("/data/imagenet"),
)
OPTIONS = SlurmOptions(partition="gpu", time="2:00:00", account="vision", cpus_per_task=12)


def test_256_gpus() -> None:
    options = replace(OPTIONS, constraint="h100&ib", lines=("--exclusive", "#SBATCH --mail-type=END"))
    assert (
        script(RUN, options)
        == r"""#!/bin/bash
#SBATCH --job-name=imagenet
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --partition=gpu
#SBATCH --account=vision
#SBATCH --constraint='h100&ib'
#SBATCH --time=2:00:00
#SBATCH --output=/runs/imagenet/logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mail-type=END

trap 'kill -TERM "$run"' USR1
trap : TERM
hvd-lb train --data /data/imagenet --gpus 256 --output /runs/imagenet --launcher slurm &
run=$!
while wait "$run"; status=$?; kill -0 "$run" 2>/dev/null; do :; done
# It has stopped with a checkpoint: before the time limit or for a more urgent job, unless it was cancelled.
if [[ $status =~ ^(143|138|140)$ ]] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  trap - TERM
  # Until Slurm ends this script: its own exit might count for the next start.
  scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$status"
"""
    )


def test_on_cpus_without_requeue_in_a_container() -> None:
    run = replace(
        RUN,
        device="cpu",
        processes=5,
        per_node=2,
        environment={"TOKEN": "geheim", "WANDB_MODE": "offline"},
        output=Path("/runs/100 %, #1"),
        arguments=("train", "--data", "it's; rm -rf /", "--output", "/runs/100 %, #1"),
        name="100 %, #1\n#SBATCH --uid=0",
    )
    options = SlurmOptions(
        requeue=False, container_image="ghcr.io#hvd-lb/hvd-lb:1", container_mounts=("/a b",)
    )
    assert (
        script(run, options, ("/opt/venv/bin/hvd-lb",)) == r"""#!/bin/bash
#SBATCH --job-name=100-1-SBATCH---uid-0
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=2
#SBATCH --output='/runs/100 %%, #1/logs/slurm-%j.out'
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --no-requeue

exec /opt/venv/bin/hvd-lb train --data 'it'"'"'s; rm -rf /' --output '/runs/100 %, #1' --launcher slurm """
        r"""--env TOKEN --env WANDB_MODE --container-image 'ghcr.io#hvd-lb/hvd-lb:1' --container-mount '/a b'
"""
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SlurmOptions(partition="gpu\n#SBATCH --uid=0"), "--partition .* printable"),
        (SlurmOptions(account=""), "--account '' cannot"),
        (SlurmOptions(lines=("rm -rf /",)), "--sbatch 'rm -rf /' is not an option of sbatch"),
        (SlurmOptions(lines=("--exclusive\nrm -rf /",)), "is not an option of sbatch"),
    ],
)
def test_what_is_no_option_is_refused(options: SlurmOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(RUN, options)


def test_a_folder_that_slurm_cannot_name_is_refused() -> None:
    with pytest.raises(UserError, match="backslash"):
        script(replace(RUN, output=Path("/runs/a\\b")), OPTIONS)
    with pytest.raises(UserError, match="printable"):
        script(replace(RUN, output=Path("/runs/a\nb")), OPTIONS)


@pytest.mark.parametrize("requeue", [True, False])
def test_bash_takes_the_script_and_leaves_arguments_as_they_are(tmp_path: Path, requeue: bool) -> None:
    hostile = ("train", "--data", "$(touch pwned) `touch pwned` \"'\\;&|<>*?~#!{}", "-", "")
    run = replace(RUN, arguments=hostile)
    text = script(run, replace(OPTIONS, requeue=requeue), ("printf", "[%s]\\n"))
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "".join(f"[{word}]\n" for word in (*hostile, "--launcher", "slurm"))
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="needs sbatch, and there is none on PATH.*login node"):
        submit(script(RUN, OPTIONS), tmp_path / "runs" / "one", {})
    assert list(tmp_path.iterdir()) == []
    assert log_file(tmp_path, "12") == tmp_path / "logs" / "slurm-12.out"


def test_paths_are_mounted_once() -> None:
    assert OPTIONS.container(Path("/data")) is None
    options = replace(OPTIONS, container_image="i", container_mounts=("/a", "/data"))
    container = options.container(Path("/data"), None, Path("/out"))
    assert container is not None
    assert container.mounts == ("/data", "/out", "/a")


def test_containers_of_docker_are_started_inside_of_the_allocation() -> None:
    text = script(replace(RUN, image="ghcr.io/hvd-lb/hvd-lb:0.1.0", container_port=2222), SlurmOptions())
    assert "--launcher slurm --image ghcr.io/hvd-lb/hvd-lb:0.1.0 --container-port 2222" in text
