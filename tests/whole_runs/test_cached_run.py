"""Runs with a cache of decoded images: to the bit those without, on one process and on two; killed, they leave none.

And processes that come later find in it what those before them have decoded.
"""

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elastic_runs import events, with_faults
from PIL import Image
from real_runs import Start, finish, kill_all, processes_of, records, until

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


@pytest.mark.long
@pytest.mark.parametrize(
    ("cache", "loader", "engine"),
    [
        ("memory", "dali", "torch"),
        ("memory", "torchvision", "horovod"),
        ("disk", "dali", "horovod"),
        ("disk", "torchvision", "torch"),
    ],
)
def test_who_joins_an_elastic_run_decodes_nothing_again(
    folder: Path,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    loader: str,
    engine: str,
) -> None:
    """After two epochs the files hold other bytes: a killed rank's successor trains on the pixels that were theirs."""
    before, gate = in_memory(), tmp_path / "gate"
    whole = ("train", "--data", folder, *RUN, "--epochs", 4, "--last-batch", "keep", "--loader", loader)
    bad = ("--on-bad-image", "skip", "--max-bad-images", 1)
    finish(start(*whole, *bad, "--processes", 1, "--output", tmp_path / "plain"))
    with_faults(tmp_path, monkeypatch, [(0, "step", 6, str(gate)), (1, "step", 7, "SIGKILL")])
    options = ("--processes", 2, "--elastic", "--min-processes", 2, "--engine", engine, "--cache", cache)
    run = tmp_path / "run"
    process = start(*whole, *bad, *options, "--output", run)
    until(lambda: gate.with_name("gate.there").exists())
    for file in {*folder.rglob("*.jpg")} - {folder / "train" / "bee" / "7.jpg"}:  # which is not kept
        times = file.stat()
        file.write_bytes(bytes(times.st_size))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    gate.touch()
    finish(process)
    (change,) = events(run)
    assert (change["lost"], change["joined"]) == (["rank 1 on localhost (ended by SIGKILL)"], 1)
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        one, other = (tmp_path / of / "checkpoints" / "last" / file for of in ("plain", "run"))
        assert one.read_bytes() == other.read_bytes(), file
    assert in_memory() <= before
    assert not processes_of(run)


def test_what_needs_no_cache_is_refused_in_one_line(start: Start, tmp_path: Path) -> None:
    _, err = finish(
        start("train", "--data", "digits", "--cache", "disk", "--device", "cpu", "--output", tmp_path / "r"),
        2,
    )
    assert err.strip().endswith("the images of digits need no decoding; leave the option out")
