"""SIGKILL to a whole job at random moments, again and again: the end is bitwise that of the undisturbed run.

HVD_LB_KILLS says how often. What a moment hits depends on the machine; it is printed (pytest -rP).
"""

import json
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import pytest
from real_runs import (
    SMALL,
    Start,
    assert_agrees,
    assert_equal_metrics,
    finish,
    kill,
    kill_all,
    processes_of,
    records,
    trained_steps,
    until,
)

from hvd_lb.training.checkpoint import CheckpointStore, open_checkpoint

KILLS = int(os.environ.get("HVD_LB_KILLS", "4"))
# Of 1,438 images in steps of 96.
STEPS_PER_EPOCH = 15
# More than a kill lets through.
EPOCHS = 2 + math.ceil(KILLS / 2)
MOST_STEPS = 10
# Moments in a write: files as they come, the checkpoint under its name, and the removal of an old one.
WRITES = (".writing-*", ".writing-*/optimizer.safetensors", ".writing-*/state.json", "step-*", ".removing-*")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
    pytest.mark.timeout(600 + 90 * KILLS),
]


@dataclass(frozen=True)
class Plan:
    """One start of the run and its kill.

    After so many seconds, or after so many steps, and `pause` seconds after a new `file` was then seen.
    """

    processes: int
    seconds: float = math.inf
    steps: int = 1
    file: str | None = None
    pause: float = 0


def plans(draw: random.Random, start_seconds: float) -> list[Plan]:
    """As many kills while starting as while training and while writing a checkpoint, in any order."""
    kinds = [("starting", "training", "writing")[i % 3] for i in range(KILLS)]
    draw.shuffle(kinds)
    files = cycle(WRITES)
    drawn = []
    for kind in kinds:
        processes = draw.randint(1, 4)
        if kind == "starting":
            drawn.append(Plan(processes, seconds=draw.uniform(0, 1.5 * start_seconds)))
        elif kind == "training":
            drawn.append(Plan(processes, steps=draw.randint(1, MOST_STEPS)))
        else:
            steps, pause = draw.randint(1, MOST_STEPS // 2), draw.choice((0, draw.uniform(0, 0.015)))
            drawn.append(Plan(processes, steps=steps, file=next(files), pause=pause))
    return drawn


class Attempt:
    """What in the run directory is of the present start, and what of earlier ones."""

    def __init__(self, run: Path):
        self._run = run
        self._store = CheckpointStore(run / "checkpoints")
        self._metrics = run / "metrics.jsonl"
        self._metrics_before = self._metrics_written()
        self._files_before = set(self._files("**/*"))
        checkpoint, problems = self._store.newest_intact()
        assert problems == {}
        self.first_step = checkpoint.step if checkpoint else 0

    def steps(self) -> int:
        """Taken since the start, which removes the records of those that it takes again."""
        started = self._metrics_written() != self._metrics_before
        return trained_steps(self._run) - self.first_step if started else 0

    def files(self, pattern: str) -> set[tuple[Path, int]]:
        """Those in checkpoints/ that this start has made or changed, with the times of that."""
        return set(self._files(pattern)) - self._files_before

    def phase(self) -> str:
        if unfinished := self.files(".*"):
            return f"writing: {' '.join(sorted(path.name for path, _ in unfinished))}"
        return "training" if self.steps() else "starting"

    def _metrics_written(self) -> int | None:
        return self._metrics.stat().st_mtime_ns if self._metrics.exists() else None

    def _files(self, pattern: str) -> Iterator[tuple[Path, int]]:
        for path in self._store.folder.glob(pattern):
            try:
                yield path, path.lstat().st_mtime_ns
            except FileNotFoundError:
                continue


def command(run: Path, processes: int) -> list[object]:
    return [
        *("train", *SMALL, "--reproducible", "--gpus", 4, "--per-gpu-batch", 24, "--last-batch", "keep"),
        *("--epochs", EPOCHS, "--log-every", 1, "--checkpoint-every", "3steps"),
        *("--processes", processes, "--output", run),
    ]


def start_and_kill(start: Start, run: Path, plan: Plan) -> str:
    """The phase that the kill hit."""
    attempt = Attempt(run)
    process = start(*command(run, plan.processes))
    deadline = time.monotonic() + plan.seconds

    def reached(steps: int) -> bool:
        return attempt.steps() >= steps or time.monotonic() > deadline or process.poll() is not None

    until(lambda: reached(plan.steps), 240, every=0.01)
    if plan.file:
        processes, seen = processes_of(run), attempt.files(plan.file)
        until(lambda: attempt.files(plan.file) - seen or reached(MOST_STEPS), every=0.001)
        time.sleep(plan.pause)
        kill(processes)
    kill_all(run)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, f"{out}\n{err}"
    assert "warning" not in out
    print(
        f"{plan.processes} processes from step {attempt.first_step}, {attempt.steps()} steps: {attempt.phase()}"
    )
    return attempt.phase().partition(":")[0]


def assert_readable(run: Path) -> None:
    """Every checkpoint and what `last` and `best` point at, and all of metrics.jsonl but an unfinished last line; and
    these agree."""
    checkpoints = run / "checkpoints"
    for path in (*checkpoints.glob("step-*"), *checkpoints.glob("last"), *checkpoints.glob("best")):
        open_checkpoint(path)
    if (run / "metrics.jsonl").exists():
        *lines, _ = (run / "metrics.jsonl").read_text().split("\n")
        for line in lines:
            json.loads(line)
    if (run / "recipe.yaml").exists():
        assert_agrees(run)


@pytest.mark.parametrize("seed", [0])
def test_killed_again_and_again_it_ends_at_the_same_bits(start: Start, tmp_path: Path, seed: int) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    began = time.monotonic()
    process = start(*command(undisturbed, 1))
    until(lambda: trained_steps(undisturbed), every=0.01)
    start_seconds = time.monotonic() - began
    finish(process)

    draw = random.Random(seed)
    phases = Counter()
    for plan in plans(draw, start_seconds):
        phases[start_and_kill(start, run, plan)] += 1
        assert_readable(run)
    print(dict(phases))
    out, _ = finish(start(*command(run, draw.randint(1, 4))))
    assert "warning" not in out

    steps = EPOCHS * STEPS_PER_EPOCH
    assert [record["step"] for record in records(run) if record["kind"] == "train"] == list(range(steps))
    assert_equal_metrics([undisturbed, run], 0)
    assert_agrees(run)
    for name in ("last", "best"):
        whole, killed = (of / "checkpoints" / name for of in (undisturbed, run))
        assert killed.resolve().name == whole.resolve().name
        for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
            assert (killed / file).read_bytes() == (whole / file).read_bytes()
    out, _ = finish(start("compare", undisturbed, run))
    assert out.splitlines()[-1] == "bitwise identical"
