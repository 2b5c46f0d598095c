"""Runs with a cache of decoded images: to the bit those without, on one process and on two; killed, they leave none."""

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_runs import Start, finish, kill_all, records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]

RUN = (
    *("--gpus", 2, "--per-gpu-batch", 8, "--epochs", 2, "--reproducible", "--device", "cpu"),
    *("--model", "resnet8", "--image-size", 24, "--log-every", 1, "--loader-threads", 2, "--prefetch", 1),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JPEGs of noise, and a broken one."""
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for i in range(count):
            place = tmp_path / "data" / split / ("ant", "bee")[i % 2] / f"{i}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(place)
    broken = tmp_path / "data" / "train" / "bee" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:-40])
    return tmp_path / "data"


def in_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.endswith(".pixels")}


def test_a_cache_changes_no_bit(
    folder: Path, start: Start, hvd_lb: Callable[..., Any], tmp_path: Path
) -> None:
    before = in_memory()
    runs = []
    for cache, processes in (("none", 1), ("memory", 1), ("memory", 2), ("disk", 2), ("disk", 1)):
        run = tmp_path / f"{len(runs)}-{cache}-{processes}"
        command = ("train", "--data", folder, *RUN, "--processes", processes, "--cache", cache)
        finish(start(*command, "--on-bad-image", "skip", "--max-bad-images", 1, "--output", run))
        runs.append(run)
    assert all(0 <= record["data_wait"] <= 1 for record in records(runs[2]) if record["kind"] == "train")
    for run in runs[1:]:
        said = hvd_lb("compare", runs[0], run)
        assert said.out.splitlines()[-1] == "bitwise identical", said.out
        assert (run / "bad_images.jsonl").read_text() == (runs[0] / "bad_images.jsonl").read_text()
    assert in_memory() <= before


def test_a_killed_run_leaves_nothing_in_memory(folder: Path, start: Start, tmp_path: Path) -> None:
    before = in_memory()
    run = tmp_path / "run"
    command = ("train", "--data", folder, *RUN, "--cache", "memory", "--epochs", 1000, "--output", run)
    started = start(*command, "--on-bad-image", "skip", "--max-bad-images", 1)
    while started.poll() is None and not ((run / "metrics.jsonl").exists() and records(run)):
        time.sleep(0.05)
    kill_all(run)
    started.wait()
    assert in_memory() <= before


def test_what_needs_no_cache_is_refused_in_one_line(start: Start, tmp_path: Path) -> None:
    _, err = finish(
        start("train", "--data", "digits", "--cache", "disk", "--device", "cpu", "--output", tmp_path / "r"),
        2,
    )
    assert err.strip().endswith("the images of digits need no decoding; leave the option out")
