"""Broken images in real runs: skipped, they make the same run on any number of processes, each case told once."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_runs import (
    Start,
    assert_equal_metrics,
    finish,
    kill_all,
    processes_of,
    records,
    trained_steps,
    until,
)

from hvd_lb.data.dataset import open_dataset
from hvd_lb.plan.counter import generator_seed
from hvd_lb.plan.samples import SamplePlan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]

K, N, EPOCHS, IMAGES = 3, 4, 2, 48
BOMB = b"P6 30000 30000 255\n"


def cut_short(content: bytes) -> bytes:
    return content[: len(content) * 9 // 10]


def damage(content: bytes) -> bytes:
    """Begins and ends as it should."""
    return content[:400] + bytes(300) + content[700:]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "train/ant/3.jpg": cut_short,
    "train/ant/5.jpg": lambda content: BOMB,
    "train/ant/6.png": damage,
    "train/ant/7.jpg": lambda content: b"",
    "train/bee/20.png": cut_short,
    "train/bee/23.jpg": lambda content: b"no image" * 30,
    "val/ant/0.png": damage,
    "val/bee/1.jpg": lambda content: b"",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in (("train", IMAGES // 2), ("val", 6)):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                levels = random.integers(0, 256, (20 + i % 3, 24, 3), np.uint8)
                Image.fromarray(levels).save(folder / split / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    for name, spoil in BROKEN.items():
        path = folder / name
        path.write_bytes(spoil(path.read_bytes()))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))


def a_run(data: Path, run: Path, *more: object) -> list[object]:
    return [
        *("train", "--data", data, "--device", "cpu", "--model", "resnet8", "--image-size", 16),
        *("--gpus", K, "--per-gpu-batch", N, "--epochs", EPOCHS, "--log-every", 1, "--reproducible"),
        *("--output", run, *more),
    ]


SKIP = ("--on-bad-image", "skip", "--max-bad-images", 0.2, "--recompute-bn", 10)


def bad_images(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]


def expected_positions(data: Path) -> list[tuple[int, int, int, int, int]]:
    """(epoch, step, worker, position, image) of every broken training image, from the plan alone."""
    train = open_dataset(str(data), on_bad_image="skip").train
    broken = {i for i in range(len(train)) if str(Path(train.name(i)).relative_to(data)) in BROKEN}
    plan = SamplePlan(len(train), K, N, generator_seed(0, 2))
    steps = plan.steps_per_epoch
    return [
        (epoch, epoch * steps + step, worker, position, int(image))
        for epoch in range(EPOCHS)
        for step in range(steps)
        for worker in range(K)
        for position, image in enumerate(plan.image_ids(epoch, step, worker))
        if int(image) in broken
    ]


@pytest.mark.parametrize(
    ("loader", "counts"), [("dali", (1, 3)), pytest.param("torchvision", (1, 2, 3), marks=pytest.mark.long)]
)
def test_skipping_makes_the_same_run_on_any_number_of_processes(
    loader: str, counts: tuple[int, ...], start: Start, data: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / str(processes) for processes in counts]
    for processes, run in zip(counts, runs, strict=True):
        out, _ = finish(start(*a_run(data, run, *SKIP, "--loader", loader, "--processes", processes)))
        assert "bad images: another one stood in" in out
        assert out.count("cannot be decoded (") == 1  # the first is told while the run goes on
    for name in (
        "checkpoints/last/model.safetensors",
        "checkpoints/last/optimizer.safetensors",
        "bad_images.jsonl",
    ):
        first, *others = [(run / name).read_bytes() for run in runs]
        assert all(other == first for other in others), name
    assert_equal_metrics(runs, 0)

    found = bad_images(runs[-1])
    trained = [
        tuple(of[key] for key in ("epoch", "step", "worker", "position", "image"))
        for of in found
        if of["of"] == "train"
    ]
    assert trained == expected_positions(data)
    assert len(trained) == 6 * EPOCHS
    seen = {str(Path(of["path"]).relative_to(data)) for of in found}
    assert seen == set(BROKEN)
    assert all(str(Path(of["stand_in_path"]).relative_to(data)) not in BROKEN for of in found)
    left_out = [(of["epoch"], of["worker"], of["position"]) for of in found if of["of"] == "eval"]
    assert left_out == [(epoch, *where) for epoch in range(EPOCHS) for where in ((0, 0), (1, 3))]
    assert [of["images"] for of in records(runs[0]) if of["kind"] == "eval"] == [10] * EPOCHS
    assert json.loads((runs[0] / "summary.json").read_text())["bad_images"] == len(found)


def test_a_killed_run_goes_on_and_tells_every_case_once(start: Start, data: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    recipe = (*SKIP, "--steps", 8, "--checkpoint-every", "1steps")
    finish(start(*a_run(data, whole, *recipe, "--processes", 1)))
    first = start(*a_run(data, run, *recipe, "--processes", 2))
    until(lambda: trained_steps(run) > 3, every=0.01)
    kill_all(run)
    assert first.wait(30) in (-signal.SIGKILL, 0)
    if not (run / "summary.json").exists():
        finish(start(*a_run(data, run, *recipe, "--processes", 3)))
    assert (run / "bad_images.jsonl").read_bytes() == (whole / "bad_images.jsonl").read_bytes()
    name = "checkpoints/last/model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_rotten_data_ends_the_run_at_the_step_that_the_plan_tells(
    start: Start, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ("--on-bad-image", "skip", "--max-bad-images", 0.05, "--processes", 3)
    _, err = finish(start(*a_run(data, run, *more)), 1)
    assert err.count("\n") == 1
    assert "3 of the 48 training images cannot be decoded, more than --max-bad-images 0.05" in err
    third = expected_positions(data)[2][1]
    assert [of["step"] for of in bad_images(run)][-1] == third
    assert not processes_of(run)


def test_a_run_that_failed_goes_on_with_skip(start: Start, data: Path, tmp_path: Path) -> None:
    """Broken headers are told at once, broken pixels when the plan comes to them, with the step."""
    run, skipping = tmp_path / "run", tmp_path / "skipping"
    _, err = finish(start(*a_run(data, run, "--processes", 2)), 2)
    assert err.count("\n") == 1
    assert "train/ant/5.jpg: cannot be decoded" in err
    assert "(3 such files in" in err

    good = tmp_path / "good"
    for path in data.rglob("*.*"):
        copy = good / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        broken_header = path.stat().st_size < 300
        copy.write_bytes((data / "train/ant/0.png" if broken_header else path).read_bytes())
    (good / "val/ant/0.png").write_bytes((good / "val/ant/2.png").read_bytes())
    more = ("--checkpoint-every", "1steps", "--processes", 2)
    skip = ("--on-bad-image", "skip", "--max-bad-images", 0.2)
    _, err = finish(start(*a_run(good, run, *more)), 1)
    assert err.count("\n") == 1
    assert "rank " in err
    assert ", in epoch 0 step " in err
    assert "or --on-bad-image skip" in err
    assert not processes_of(run)
    finish(start(*a_run(good, run, *more, *skip)))
    finish(start(*a_run(good, skipping, *more, *skip)))
    assert_equal_metrics([run, skipping], 0)
    for name in ("checkpoints/last/model.safetensors", "bad_images.jsonl"):
        assert (run / name).read_bytes() == (skipping / name).read_bytes()
