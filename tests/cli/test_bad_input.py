"""Bad input: one line that names what was given and the fix, exit code 2, nothing left half-made."""

import fcntl
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host, read_hostfile
from hvd_lb.recipe import Recipe

# The fixture of conftest.py: arguments to what was said.
Run = Callable[..., Any]
DIGITS = ("train", "--data", "digits", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*DIGITS, "--gpus", 256), "use at most 44 GPUs"),
        ((*DIGITS, "--output", "s3://bucket/run"), "s3://bucket/run is an address"),
        (("data", "pack", "digits", "gs://bucket/digits"), "gs://bucket/digits is an address"),
        (("data", "export", "digits", "https://host/digits"), "https://host/digits is an address"),
        ((*DIGITS, "--output", "--resume"), "--output has no value, as the option --resume follows"),
        ((*DIGITS, "--resume", "--output=x"), "--resume has no value"),
        ((*DIGITS, "--val", "--help"), "write --val=--help"),
        (("data", "pack", "digits", "--threads", "--quality", 3), "--threads has no value"),
        ((*DIGITS, "--gpus", 0), "--gpus 0"),
        ((*DIGITS, "--gpus", -2), "--gpus -2"),
        ((*DIGITS, "--gpus", "two"), "'two' is not a valid integer"),
        ((*DIGITS, "--per-gpu-batch", 0), "--per-gpu-batch 0"),
        ((*DIGITS, "--gpus", 2, "--processes", 3), "--processes 3 for 2 virtual workers"),
        ((*DIGITS, "--processes", 0), "--processes"),
        ((*DIGITS, "--model", "resnet51"), "did you mean 'resnet56'"),
        ((*DIGITS, "--recipe", "digitz"), "did you mean 'digits'"),
        ((*DIGITS, "--lr-rule", "cubic"), "not one of linear, sqrt, none"),
        ((*DIGITS, "--schedule", "steps"), "not one of step, cosine, polynomial"),
        ((*DIGITS, "--seed", -1), "--seed -1"),
        ((*DIGITS, "--gpuz", 2), "Did you mean '--gpus'"),
        ((*DIGITS, "--num-classes", 3), "digits has 10 classes"),
        ((*DIGITS, "--momentum-form", 9, "--no-momentum-correction"), "form 9 needs no correction"),
        ((*DIGITS, "--checkpoint-every", "often"), "--checkpoint-every often"),
        ((*DIGITS, "--checkpoint-every", "10sec"), "500steps, 10min, 1epoch or never"),
        ((*DIGITS, "--eval-every", "10min"), "500steps, 1epoch or never"),
        ((*DIGITS, "--recompute-bn", 2000), "the data set has 1438 training images"),
        ((*DIGITS, "--recompute-bn", 9, "--model", "squeezenet1_1", "--image-size", 32), "has no batch norm"),
        ((*DIGITS, "--recompute-bn", 0), "--recompute-bn 0"),
        (
            (*DIGITS, "--gpus", 16, "--warmup-epochs", 99),
            "--warmup-epochs less than 30, or --epochs more than 99",
        ),
        ((*DIGITS, "--gpus", 256, "--per-gpu-batch", 32), "44 GPUs at 32 images each, or --last-batch keep"),
        ((*DIGITS, "--gpus", 1, "--per-gpu-batch", 2000), "images per GPU, or --last-batch keep"),
        (
            (*DIGITS, "--gpus", 2, "--per-gpu-batch", 4, "--repeated-augment", 9),
            "--repeated-augment 9, but a",
        ),
        ((*DIGITS, "--cuda-graphs", "on"), "--cuda-graphs on, but this run is on CPUs"),
        (("simulate", "--device", "cpu", "--cuda-graphs", "on"), "--cuda-graphs on, but this run is on CPUs"),
        ((*DIGITS, "--cuda-graphs", "on", "--compile"), "a compiled network launches its own way"),
        ((*DIGITS, "--val-fraction", 0.5), "--val-fraction"),
        ((*DIGITS, "--resume", "nowhere"), "nowhere is no checkpoint"),
        ((*DIGITS, "--max-rollbacks", 5), "--max-rollbacks has no effect with on-nan stop"),
        ((*DIGITS, "--dry-run", "--forecast", "nowhere.json"), "forecast nowhere.json cannot be read"),
        ((*DIGITS, "--gpus", 2, "--timeline", "nowhere/x.json"), "nowhere/x.json cannot be written"),
        ((*DIGITS, "--hosts", "h1:2", "--ssh-key", "nowhere"), "--ssh-key nowhere: no such file"),
        (("train", "--data", "nowhere", "--device", "cpu"), "nowhere"),
        (("train", "--data", "synthetic:many", "--device", "cpu"), "synthetic:many"),
        (
            ("train", "--data", "Fashion_MNIST", "--device", "cpu"),
            "no such folder; did you mean 'fashion-mnist'?",
        ),
        (("trian",), "No such command"),
        (("simulate", "--budget", "3 parsecs"), "such as 60s"),
        (("recipes", "goyal"), "goyal-resnet50"),
        # no finite number, or one of more digits than anything has
        ((*DIGITS, "--learning-rate", "inf"), "--learning-rate inf: expected a finite number"),
        ((*DIGITS, "--learning-rate", "1e400"), "--learning-rate inf: expected a finite number"),
        (
            (*DIGITS, "--learning-rate", "1e40"),
            "--learning-rate 1e+40: input should be less than or equal to 1e+30\n",
        ),
        ((*DIGITS, "--learning-rate", "1e-40"), "--learning-rate 1e-40: input should be greater than"),
        ((*DIGITS, "--learning-rate", "1e30", "--reference-batch", "1"), "has the rate 3.2e+31: expected"),
        ((*DIGITS, "--reference-batch", "9" * 400), "--reference-batch 999"),
        ((*DIGITS, "--weight-decay", "1e40"), "--weight-decay 1e+40"),
        ((*DIGITS, "--clip-norm", "1e-300"), "--clip-norm 1e-300"),
        ((*DIGITS, "--optimizer", "lamb", "--epsilon", "1e-300"), "--epsilon 1e-300"),
        ((*DIGITS, "--optimizer", "lars", "--trust-coefficient", "1e300"), "--trust-coefficient 1e+300"),
        ((*DIGITS, "--crop-scale", "nan,1"), "--crop-scale nan,1: expected a finite number"),
        ((*DIGITS, "--crop-scale", "0.5"), "--crop-scale 0.5: expected 2 numbers"),
        ((*DIGITS, "--drop-epochs", "30,inf"), "--drop-epochs 30,inf: expected a finite number"),
        ((*DIGITS, "--gpus", 10**30), "--gpus 1000"),
        ((*DIGITS, "--steps", "9" * 5000), "is not a valid integer"),
        ((*DIGITS, "--eval-every", "infsteps"), "such as 500steps"),
        ((*DIGITS, "--cycle-time", "nan"), "not in the range"),
        ((*DIGITS, "--fusion-threshold", "inf"), "not in the range"),
        (("train", "--data", f"synthetic:{10**30}", "--device", "cpu"), "below 10⁹"),
        (("train", "--data", "a" * 5000, "--device", "cpu"), "name too long"),
        (("train", "--launcher", "slurm", "--data", "digits", "--slurm-memory", "inf"), "such as 480G"),
        (("train", "--launcher", "slurm", "--data", "digits", "--slurm-time", "nan"), "such as 24:00:00"),
        (
            ("train", "--launcher", "slurm", "--data", "digits", "--slurm-cpus-per-task", 10**30),
            "not in the range",
        ),
        (
            ("train", "--launcher", "kubernetes", "--data", "digits", "--k8s-memory", "inf"),
            "is not a quantity",
        ),
        (("simulate", "--budget", "inf"), "such as 60s"),
        (("simulate", "--price-per-gpu-hour", "inf"), "inf is not in the range x>=0"),
        (("simulate", "--budget", "9" * 400 + "s"), "such as 60s"),
        (("data", "info", "digits", "--val-fraction", "nan"), "not in the range"),
        (("data", "pack", "digits", "x", "--shard-size", "9" * 400 + "GB"), "such as 500MB"),
        (("data", "pack", "digits", "x", "--quality", 3), "give --max-side as well"),
        (("data", "info", "digits", "--seed", 3), "give --sheet FILE.png as well"),
        # a variable of the shell that is not set
        ((*DIGITS, "--recipe", ""), "--recipe is empty"),
        ((*DIGITS, "--output="), "--output is empty"),
        (("train", "--data", "", "--device", "cpu"), "--data is empty"),
        (("compare", "", "b"), "an argument is empty"),
        ((*DIGITS, "--output", "~nobody-of-that-name/x"), "no such home directory"),
    ],
)
def test_one_line(arguments: tuple[object, ...], told: str, hvd_lb: Run, in_empty_folder: Path) -> None:
    said = hvd_lb(*arguments)
    assert said.status == 2
    assert told in said.err
    assert said.err.startswith("hvd-lb: error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not list(in_empty_folder.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--hostfile", "pipe"), "hostfile pipe names no host"),
        (("--class-weights", "pipe"), "'0' has no line"),
        (("--forecast", "pipe"), "forecast pipe is none"),
        (("--k8s-patch", "pipe", "--launcher", "kubernetes", "--k8s-volume", "pvc:c:/r", "--output", "/r/a",
          "--image", "i"), "pipe: expected a manifest"),
    ],
)  # fmt: skip
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(
    words: tuple[str, ...], told: str, hvd_lb: Run, in_empty_folder: Path
) -> None:
    os.mkfifo("pipe")
    said = hvd_lb(*DIGITS, "--gpus", 2, "--dry-run", *words)
    assert (said.status, said.out) == (2, "")
    assert told in said.err
    assert said.err.count("\n") == 1


def test_hosts_that_a_command_writes_into_a_pipe(in_empty_folder: Path) -> None:
    os.mkfifo("pipe")
    with subprocess.Popen(["sh", "-c", "exec > pipe; sleep 0.2; echo h1 slots=3"]):
        while not (hosts := _hosts_of("pipe")):  # until it has opened it
            time.sleep(0.01)
    assert hosts == [Host("h1", 3)]


def _hosts_of(path: str) -> list[Host]:
    try:
        return read_hostfile(Path(path))
    except UserError:
        return []


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_no_ssh(hvd_lb: Run, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(in_empty_folder))
    said = hvd_lb(*DIGITS, "--hosts", "h1:2")
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert "reached by ssh, and there is none on PATH" in said.err


def test_what_cannot_be_written_is_told_at_once(hvd_lb: Run, in_empty_folder: Path) -> None:
    Path("file").touch()
    Path("loop").symlink_to("loop")
    for command, told in (
        (("data", "pack", "digits", "loop"), "a link that leads to itself"),
        (
            ("data", "verify", "digits", "--json", "none/x"),
            "none/x cannot be written: expected the name of a file",
        ),
        (("sweep", "run", "loop", "--data", "digits", "--vary", "gpus=1,2"), "loop cannot be made"),
        (("sweep", "run", "file/x", "--data", "digits", "--vary", "gpus=1,2"), "file/x cannot be made"),
    ):
        said = hvd_lb(*command)
        assert said.status == 2, said
        assert told in said.err
        assert said.err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"file", "loop"}


def test_an_output_among_the_classes(hvd_lb: Run, in_empty_folder: Path) -> None:
    """Once written, its folder would be a class of the next start, or stop it."""
    for number, place in enumerate(("ant", "bee") * 4):
        folder = Path("photos", place)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    Path("link").symlink_to("photos")
    of_run = (
        "--data",
        "photos",
        "--val-fraction",
        0.3,
        "--recipe",
        "digits",
        "--gpus",
        1,
        "--per-gpu-batch",
        1,
    )
    for command in (
        ("train", "--device", "cpu", *of_run, "--output", "photos/runs/one"),
        ("train", "--device", "cpu", *of_run, "--output", "link/ant/../one", "--dry-run"),
        ("simulate", "--device", "cpu", *of_run, "--run", "--output", "photos/one"),
        ("simulate", "--device", "cpu", *of_run, "--cluster", "dgx-h100", "--output", "photos/forecast"),
        ("sweep", "run", "photos/sweep", *of_run, "--vary", "gpus=1,2"),
        ("data", "export", "photos", "photos/all", "--val-fraction", 0.3),
    ):
        said = hvd_lb(*command)
        assert said.status == 2, said
        assert "lies in photos, where each folder is a class of images" in said.err
        assert said.err.count("\n") == 1
    assert {path.name for path in Path("photos").iterdir()} == {"ant", "bee"}
    said = hvd_lb("train", "--device", "cpu", *of_run, "--output", "photos/.runs/one", "--dry-run")
    assert said.status == 0, said.err


def test_no_data_names_the_choices(hvd_lb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HVD_LB_DATA", raising=False)
    monkeypatch.setattr("hvd_lb.data.spec._USUAL_FOLDER", Path("/nonexistent"))
    said = hvd_lb("train", "--device", "cpu")
    assert said.status == 2
    assert all(word in said.err for word in ("--data", "digits", "synthetic", "HVD_LB_DATA"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there(hvd_lb: Run) -> None:
    said = hvd_lb("train", "--data", "digits", "--device", "cuda", "--gpus", 4)
    assert said.status == 2
    assert all(word in said.err for word in ("0 CUDA GPUs", "--hosts", "--device cpu", "simulate"))


def test_a_yaml_file_with_a_misspelt_key(hvd_lb: Run, in_empty_folder: Path) -> None:
    Path("mine.yaml").write_text("model: resnet8\nlearning_rat: 0.1\n")
    said = hvd_lb(*DIGITS, "--recipe", "mine.yaml")
    assert said.status == 2
    assert "unknown field 'learning_rat'; did you mean 'learning_rate'" in said.err


def test_a_working_directory_that_is_gone(hvd_lb: Run, in_empty_folder: Path, tmp_path: Path) -> None:
    in_empty_folder.rmdir()
    said = hvd_lb(*DIGITS)
    assert said.status == 2
    assert said.err == "hvd-lb: error: the working directory is gone: change to one that is there\n"


def test_several_processes_do_not_each_simulate(hvd_lb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    said = hvd_lb("simulate", "--data", "digits", "--device", "cpu")
    assert said.status == 2
    assert "torchrun started this as one of 2 processes" in said.err
    monkeypatch.setattr("hvd_lb_cli.commands._RANK_0_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")  # what rank 0 was given, too, it says alone
    assert hvd_lb("simulate", "--data", "digits", "--device", "cpu") == type(said)(2, "", "")


def test_processes_without_a_rank_do_not_each_train(
    hvd_lb: Run, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = hvd_lb(*DIGITS)
    assert said.status == 2
    assert said.err.startswith("hvd-lb: error: RANK='' and WORLD_SIZE='2': expected two numbers")
    assert said.err.count("\n") == 1
    assert not list(in_empty_folder.iterdir())


def test_a_rehearsal_of_epochs_says_how_they_are_run(hvd_lb: Run, in_empty_folder: Path) -> None:
    said = hvd_lb("simulate", "--data", "digits", "--device", "cpu", "--epochs", 45, "--budget", "1s")
    assert said.status == 0
    assert "add --run to take all steps" in said.out
    assert "45 epochs, 1,980 steps" in said.out
    assert "the whole run" in said.out
    assert not list(in_empty_folder.iterdir())


def test_output_that_cannot_be_used(hvd_lb: Run, in_empty_folder: Path) -> None:
    Path("file").write_text("x")
    Path("other").mkdir()
    Path("other/thesis.tex").write_text("x")
    assert "is a file" in hvd_lb(*DIGITS, "--output", "file").err
    assert "cannot be written" in hvd_lb(*DIGITS, "--output", "file/run").err
    assert "not a run" in hvd_lb(*DIGITS, "--output", "other").err
    assert sorted(str(path) for path in Path().rglob("*")) == ["file", "other", "other/thesis.tex"]


def test_output_in_use(hvd_lb: Run, in_empty_folder: Path) -> None:
    Path("run").mkdir()
    with Path("run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = hvd_lb(*DIGITS, "--output", "run")
    assert said.status == 2
    assert "in use by another run" in said.err


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000,
        f"seed: {'9' * 5000}\n",
        "seed: 1\nseed: 1\n",
        "- x\n",
        "\0",
    ],
)
def test_a_damaged_recipe_of_a_run(hvd_lb: Run, in_empty_folder: Path, text: str) -> None:
    (in_empty_folder / "out").mkdir()
    (in_empty_folder / "out" / "recipe.yaml").write_text(text)
    said = hvd_lb(*DIGITS, "--output", "out")
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert "out/recipe.yaml" in said.err
    assert "restore it or choose another --output" in said.err
    assert hvd_lb("report", "out").status == 0


def test_output_of_another_recipe_names_the_fields(hvd_lb: Run, in_empty_folder: Path) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(Recipe(model="resnet8").to_yaml())
    said = hvd_lb(*DIGITS, "--output", "run", "--seed", 4)
    assert said.status == 2
    assert "seed: 0 → 4" in said.err


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (10, 20, 30)).save(path)


def test_folders_that_are_no_data_set(hvd_lb: Run, in_empty_folder: Path) -> None:
    def said(folder: str) -> str:
        answer = hvd_lb("train", "--device", "cpu", "--data", folder)
        assert answer.status == 2
        assert answer.err.count("\n") == 1
        return answer.err

    Path("empty").mkdir()
    assert "empty" in said("empty")
    _picture(Path("no-val/train/cat/1.png"))
    assert "val" in said("no-val")
    _picture(Path("classes/train/cat/1.png"))
    _picture(Path("classes/train/cow/1.png"))
    _picture(Path("classes/val/dog/1.png"))
    assert "dog" in said("classes")
    for label in ("cat", "cow"):
        _picture(Path(f"broken/train/{label}/1.png"))
        _picture(Path(f"broken/val/{label}/1.png"))
    Path("broken/train/cat/2.jpg").write_bytes(b"this is no image")
    assert "2.jpg" in said("broken")
    assert not Path("runs").exists()
