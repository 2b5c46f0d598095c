"""How costs grow: with virtual workers, images, and the size of the network. Each row ends with a fitted exponent.

A cost y at sizes x is fitted as y ~ x^s over the larger half of the sizes, where what is fixed hardly counts: s = 1 is
in proportion, 0 is constant. Times are of CPU, all threads together, as a busy machine hardly changes them; what a disk
takes beside them is not in them. Each memory, and each opening of an index, is measured in a process of its own.

    python benchmarks/growth.py [--rows step,memory,...] [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from index import write_index
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import hvd_lb as lb
from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.training import trainer as training
from hvd_lb.training.checkpoint import BackgroundWriter, CheckpointStore
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

Row = Callable[[bool], Iterator[dict[str, Any]]]
_PIXELS, _CLASSES, _CPU = 8, 10, torch.device("cpu")


class Tiny(nn.Module):
    """Next to no work of its own, so that what is measured is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * _PIXELS * _PIXELS, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(images).flatten(1))


def make_trainer(gpus: int, model: nn.Module, **changes: Any) -> Trainer:
    """A trainer of `model` whose batches are given to it."""
    count = max(64, gpus)
    labels = np.arange(count) % _CLASSES
    images = ArrayImages(np.zeros((count, 8, 8), np.uint8), labels, [str(i) for i in range(_CLASSES)], "-")
    build, training.build_model = training.build_model, lambda *arguments, **options: model
    try:
        made = Trainer(
            Recipe(model="resnet8", image_size=_PIXELS, gpus=gpus, per_gpu_batch=1, learning_rate=1e-4, **changes),
            Dataset("-", images, images), Solo(), device=_CPU, threads=1, observer=SilentObserver(),
        )  # fmt: skip
    finally:
        training.build_model = build
    made.model.train()
    return made


def step(small: bool) -> Iterator[dict[str, Any]]:
    """A step of k virtual workers apart, less the same forwards and backwards in a plain loop."""
    sizes = [1, 4, 16, 64] if small else [1, 16, 256, 4096]
    x, y = torch.randn(1, 3, _PIXELS, _PIXELS), torch.zeros(1, dtype=torch.int64)
    for mode in (False, True):
        added = []
        for k in sizes:
            model = Tiny()
            ours = make_trainer(k, model, together=1, reproducible=mode)
            plain = Tiny().train()
            optimizer = torch.optim.SGD(lb.parameter_groups(plain), 1e-4, 0.9, nesterov=True)

            def our_step(ours: Trainer = ours, k: int = k) -> None:
                with ours.kernels():
                    ours.train_step((x, y) for _ in range(k))

            def plain_step(plain: nn.Module = plain, optimizer: Any = optimizer, k: int = k) -> None:
                optimizer.zero_grad()
                for _ in range(k):
                    (F.cross_entropy(plain(x), y, reduction="sum") / k).backward()
                optimizer.step()

            times: dict[str, list[float]] = {"ours": [], "plain": []}
            for turn in range(6 if k <= 256 else 3):
                for name, run in (("ours", our_step), ("plain", plain_step)):
                    seconds = timed(run)
                    if turn:
                        times[name].append(1000 * seconds)
            mine, theirs = (statistics.median(of) for of in times.values())
            added.append(max(mine - theirs, 1e-6))
        title = "reproducible step" if mode else "step"
        yield fitted(f"{title}: ms of CPU added to the plain loop", "k", sizes, added)
        yield {
            "name": f"{title}: added by each worker",
            "microseconds": round(1000 * added[-1] / sizes[-1], 1),
        }


def memory(small: bool) -> Iterator[dict[str, Any]]:
    """A process's own memory: of a trainer of k workers after two steps, and of an open index of N images."""
    sizes = [1, 64] if small else [1, 64, 1024, 4096]

    def of_workers(k: int) -> float:
        before = own_memory()
        made = make_trainer(k, Tiny(), together=1)
        x, y = torch.randn(1, 3, _PIXELS, _PIXELS), torch.zeros(1, dtype=torch.int64)
        with made.kernels():
            for _ in range(2):
                made.train_step((x, y) for _ in range(k))
        return own_memory() - before

    yield fitted("memory of a trainer, MB", "k", sizes, [in_a_process(of_workers, k) for k in sizes])


def opening(small: bool) -> Iterator[dict[str, Any]]:
    """An index of N images opened by a rank, and 300 random batches of 32 of its rows."""
    from hvd_lb.data.dataset import open_dataset

    sizes = [100_000, 200_000] if small else [100_000, 1_000_000, 10_000_000]

    def first(folder: Path) -> str:
        return open_dataset(str(folder)).fingerprint()

    def rank(folder: Path) -> list[float]:
        before, began = own_memory(), time.process_time()
        data = open_dataset(str(folder), expected=fingerprint)
        opened = time.process_time() - began
        for batch in np.random.default_rng(0).integers(len(data.train), size=(300, 32)):
            assert data.train.widths[batch].all()
            data.train.index.forget()  # type: ignore[attr-defined]
        return [1000 * opened, own_memory() - before]

    found = []
    for count in sizes:
        with tempfile.TemporaryDirectory(prefix="hvd-lb-growth-") as temporary:
            os.environ["HVD_LB_CACHE"] = str(Path(temporary) / "cache")
            write_index(Path(temporary), count)
            fingerprint = in_a_process(first, Path(temporary) / "data")
            found.append(in_a_process(rank, Path(temporary) / "data"))
    times, own = zip(*found, strict=True)
    yield fitted("opening an index, ms of CPU", "N", sizes, times)
    yield fitted("memory of an open index, MB", "N", sizes, own)


class Wide(nn.Module):
    """So many parameters, and little work for each image."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        width = parameters // (3 * _PIXELS * _PIXELS)
        self.first, self.fc = nn.Linear(3 * _PIXELS * _PIXELS, width, bias=False), nn.Linear(width, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.first(images.flatten(1)))


def checkpoint(small: bool) -> Iterator[dict[str, Any]]:
    """What a checkpoint costs: copying, for which training waits, and checksums and writing by a thread."""
    sizes = [10**5, 10**6] if small else [10**5, 10**6, 10**7, 10**8]
    stalls, writes = [], []
    for parameters in sizes:
        made = make_trainer(1, Wide(parameters), together=1)
        x, y = torch.randn(1, 3, _PIXELS, _PIXELS), torch.zeros(1, dtype=torch.int64)
        with made.kernels():
            made.train_step(iter([(x, y)]))
        rounds = []
        for _ in range(3):
            with tempfile.TemporaryDirectory(prefix="hvd-lb-growth-") as folder:
                made.store = CheckpointStore(Path(folder), 1)
                made.writer = BackgroundWriter(made.store, print)
                stall = timed(made._save)
                rounds.append([1000 * stall, 1000 * (stall + timed(made.writer.close))])
        stall, whole = (statistics.median(of) for of in zip(*rounds, strict=True))
        stalls.append(stall)
        writes.append(whole)
    yield fitted("a checkpoint is taken, ms of CPU", "parameters", sizes, stalls)
    yield fitted("a checkpoint is taken and written, ms of CPU", "parameters", sizes, writes)


def evaluation(small: bool) -> Iterator[dict[str, Any]]:
    """What an evaluation of 1,024 images takes beside the network's own work, for networks of growing work."""
    depths = [8, 20] if small else [8, 20, 44, 110]
    count, whole, bare = (128 if small else 1024), [], []
    rng = np.random.default_rng(0)
    val = ArrayImages(
        rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % _CLASSES,
        [str(i) for i in range(_CLASSES)], "-",
    )  # fmt: skip
    for depth in depths:
        recipe = Recipe(model=f"resnet{depth}", image_size=32, gpus=1, per_gpu_batch=64, eval_crop=1.0)
        made = Trainer(
            recipe, Dataset("-", val, val), Solo(), device=_CPU, threads=1, observer=SilentObserver()
        )
        model = build_model(recipe.model, _CLASSES, seed=0).eval()
        batch = torch.randn(64, 3, 32, 32)

        def alone(model: nn.Module = model, batch: Tensor = batch) -> None:
            with torch.no_grad():
                for _ in range(count // 64):
                    model(batch)

        def ours(made: Trainer = made) -> None:
            made.state.step = 1
            made._evaluate(saved=True)

        ours()
        alone()
        rounds = [(timed(ours), timed(alone)) for _ in range(3)]
        mine, theirs = (statistics.median(of) for of in zip(*rounds, strict=True))
        whole.append(mine)
        bare.append(theirs)
    yield {
        "name": "an evaluation / the network alone",
        **dict(
            zip(map(str, depths), [round(a / b, 3) for a, b in zip(whole, bare, strict=True)], strict=True)
        ),
    }
    yield fitted("an evaluation, s of CPU", "seconds of the network alone", bare, whole)


# Measuring


def timed(work: Callable[[], object]) -> float:
    """Seconds of CPU of all threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


def own_memory() -> float:
    """MB that this process shares with nobody."""
    words = Path("/proc/self/smaps_rollup").read_text().split()
    return sum(int(words[words.index(name) + 1]) for name in ("Private_Clean:", "Private_Dirty:")) / 1e3


def in_a_process(work: Callable[[Any], Any], size: Any) -> Any:
    """What `work` gives, in a fork: what one allocates is not another's."""
    here, there = os.pipe()
    if pid := os.fork():
        os.close(there)
        with open(here) as answer:
            text = answer.read()
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(f"size {size}: the process failed")
        return json.loads(text)
    status = 1
    try:
        os.write(there, json.dumps(work(size)).encode())
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def fitted(name: str, unit: str, sizes: Sequence[float], costs: Sequence[float]) -> dict[str, Any]:
    half = slice(len(sizes) // 2 - (len(sizes) < 4), None)
    slope = float(np.polyfit(np.log(sizes[half]), np.log(np.maximum(costs[half], 1e-6)), 1)[0])
    values = {f"{size:.4g}": round(float(cost), 3) for size, cost in zip(sizes, costs, strict=True)}
    return {"name": name, "against": unit, **values, "exponent": round(slope, 2)}


ROWS: dict[str, Row] = {
    "step": step, "memory": memory, "opening": opening, "checkpoint": checkpoint, "evaluation": evaluation,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas")
    parser.add_argument("--small", action="store_true", help="few sizes, to try the script out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in arguments.rows.split(","):
        for row in ROWS[name](arguments.small):
            found.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
