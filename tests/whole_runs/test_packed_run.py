"""A run from shards is the folder's run, to the bit, though they were packed by a command that was killed."""

import signal
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_runs import Start, finish

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.images import ArrayImages, Dataset, same_images
from hvd_lb.data.prepare.export import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]

RUN = (
    *(
        "--gpus",
        4,
        "--per-gpu-batch",
        8,
        "--processes",
        2,
        "--steps",
        20,
        "--reproducible",
        "--device",
        "cpu",
    ),
    *("--model", "resnet8", "--flip", 0.5, "--log-every", 1),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders of 400 training and 100 validation images."""
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    digits = open_dataset("digits")

    def first(images: Any, count: int) -> ArrayImages:
        pixels = np.stack([image[..., 0] for image in images.read(np.arange(count))])
        return ArrayImages(pixels, images.labels[:count], images.classes, "digits")

    few = Dataset("digits", first(digits.train, 400), first(digits.val, 100))
    export(few, tmp_path / "folder", threads=2)
    return tmp_path / "folder"


def test_shards_give_the_folders_run(
    folder: Path, start: Start, hvd_lb: Callable[..., Any], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    pack = ("data", "pack", folder, shards, "--shard-size", "20kB")
    killed = start(*pack)
    while killed.poll() is None and len(list((shards / ".unfinished").glob("*.tar"))) < 3:
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    out, _ = finish(start(*pack))
    assert "of them kept from before" in out
    assert same_images(open_dataset(str(shards)).fingerprint(), open_dataset(str(folder)).fingerprint())

    runs = [tmp_path / "of-folder", tmp_path / "of-shards"]
    for data, run in zip((folder, shards), runs, strict=True):
        finish(start("train", "--data", data, *RUN, "--output", run))
    said = hvd_lb("compare", *runs)
    assert said.status == 0, said.out
    assert said.out.splitlines()[-1] == "bitwise identical"
