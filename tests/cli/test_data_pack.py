"""`hvd-lb data pack` and `export` as their user meets them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_it_says_what_it_made(hvd_lb: Run) -> None:
    said = hvd_lb("data", "export", "digits", "digits-folder")
    assert said.status == 0, said.err
    assert said.out == (
        "digits-folder: 1,438 training and 359 validation images in 10 classes; train with --data digits-folder\n"
    )
    said = hvd_lb("data", "pack", "digits-folder", "shards", "--shard-size", "1MB")
    assert said.status == 0, said.err
    assert said.out == ("shards: 1,797 images in 4 shards, 3.7 MB; train with --data shards\n")
    again = hvd_lb("data", "pack", "digits-folder", "shards", "--shard-size", "1000kB")
    assert again.out == (
        "shards: 1,797 images in 4 shards, 3.7 MB, 4 of them kept from before; train with --data shards\n"
    )


@pytest.mark.slow
def test_a_folder_that_is_called_as_a_built_in_data_set_is_named_so_that_it_is_found(hvd_lb: Run) -> None:
    """`--data digits` would be the built-in set, whatever lies here."""
    said = hvd_lb("data", "export", "digits", "digits")
    assert said.out.endswith("; train with --data ./digits\n"), said.err
    said = hvd_lb("data", "pack", "./digits", "synthetic")
    assert said.out.endswith("; train with --data ./synthetic\n"), said.err


def test_images_that_would_not_decode_are_counted(hvd_lb: Run) -> None:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            Path(split, name).mkdir(parents=True)
            Image.effect_noise((30, 20), 50).save(Path(split, name, "1.png"))
    Path("train/ant/2.png").write_bytes(Path("train/ant/1.png").read_bytes()[:-200])
    Path("train/ant/3.png").write_bytes(b"no image")
    said = hvd_lb("data", "pack", ".", "../shards", "--max-side", 24)
    assert said.status == 0, said.err
    assert "2 images cannot be decoded and stayed as they were; hvd-lb data verify ../shards" in said.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("pack", "nowhere", "out"), "nowhere"),
        (("pack", "digits"), "Missing argument 'DST'"),
        (("pack", "digits", "out", "--shard-size", "many"), "'many' is not a size such as 500MB"),
        (("pack", "digits", "out", "--shard-size", "500"), "'500' is not a size"),
        (("pack", "digits", "out", "--shard-size", "0MB"), "'0MB' is not a size"),
        (("pack", "digits", "out", "--max-side", 0), "--max-side"),
        (("pack", "digits", "out", "--quality", 101), "--quality"),
        (("pack", "digits", "out", "--threads", 0), "--threads"),
        (("pack", "digits", "out", "--val-fraction", 0.5), "--val-fraction 0.5"),
        (("pack", "digits", "out", "--shard-size", "1B"), "more than a million shards"),
        (("pack", ".", "train/shards"), "lies in ."),
        (("export", "nowhere", "out"), "nowhere"),
        (("export", "digits", "."), "is not empty"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: tuple[object, ...], told: str, hvd_lb: Run) -> None:
    Path("mine").write_text("x")
    said = hvd_lb("data", *arguments)
    assert said.status == 2
    assert told in said.err
    assert said.err.startswith("hvd-lb: error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert os.listdir() == ["mine"]


@pytest.mark.slow
def test_killed_the_command_goes_on_to_the_same_bytes(hvd_lb: Run) -> None:
    command = ["data", "pack", "digits", "shards", "--shard-size", "50kB"]
    assert hvd_lb("data", "pack", "digits", "undisturbed", "--shard-size", "50kB").status == 0
    kills = 0
    for wanted in (1, 20, 60):
        process = subprocess.Popen(
            [sys.executable, "-m", "hvd_lb_cli.main", *command], stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            if len(list(Path("shards/.unfinished").glob("*.tar"))) >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        kills += process.wait() == -signal.SIGKILL
        assert not Path("shards/manifest.json").exists() or not kills
    assert kills
    said = hvd_lb(*command)
    assert said.status == 0, said.err
    assert "of them kept from before" in said.out
    assert files(Path("shards")) == files(Path("undisturbed"))
