"""A rank that is slow is found by the trainer's own times: which, and whether by data or by computing."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import small_data, small_recipe
from together import together

from hvd_lb.report.metrics import RunObserver, SilentObserver, read_metrics
from hvd_lb.report.ranks import RankTimes
from hvd_lb.report.run_directory import RunDirectory
from hvd_lb.training.models import build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world import World

SLEEP = 1.0
SPENT = ("data", "compute", "network")


class Slow:
    """A loader whose batches come late."""

    def __init__(self, batches: Any, seconds: float) -> None:
        self._batches, self._seconds = batches, seconds

    @property
    def wait_seconds(self) -> float:
        return self._batches.wait_seconds

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        time.sleep(self._seconds)
        return next(self._batches)


def train(folder: Path, processes: int, in_loader: dict[int, float], in_model: dict[int, float]) -> Any:
    fresh = build_model("resnet8", 5, seed=0)

    def run(world: World) -> None:
        folder.joinpath("logs").mkdir(parents=True, exist_ok=True)
        ranks = RankTimes([f"h{rank}" for rank in range(processes)], [1] * processes, every=0)
        observer = RunObserver(RunDirectory(folder), 0, ranks) if world.rank == 0 else SilentObserver()
        trainer = Trainer(
            small_recipe(gpus=processes, log_every=1, steps=6), small_data(), world, device=torch.device("cpu"),
            threads=1, observer=observer,
        )  # fmt: skip
        batches, forward = trainer.batches, trainer.forward.logits
        trainer.batches = lambda: Slow(batches(), in_loader.get(world.rank, 0))  # type: ignore[assignment, method-assign, return-value]

        def late(images: torch.Tensor, seed: int) -> torch.Tensor:
            time.sleep(in_model.get(world.rank, 0))
            return forward(images, seed)

        trainer.forward.logits = late  # type: ignore[method-assign]
        trainer.fit()
        observer.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_lb.training.forward.build_model", lambda *args, **kwargs: copy.deepcopy(fresh))
        together(processes, run)
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "reason"), [("loader", "data"), ("model", "compute")])
def test_the_slow_one_of_three_is_named_with_its_reason(tmp_path: Path, where: str, reason: str) -> None:
    slow = {1: SLEEP} if where == "loader" else {2: SLEEP}
    records = train(
        tmp_path, 3, slow if where == "loader" else {}, slow if where == "model" else {0: 0.01, 1: 0.01}
    )
    (rank,) = slow
    found = [record for record in records if record["kind"] == "ranks"]
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4, 5]
    spent = {name: [sum(of) for of in zip(*(r[name] for r in found), strict=True)] for name in SPENT}
    assert spent[reason][rank] == max(spent[reason]) >= 6 * SLEEP
    assert spent["network"][rank] == min(spent["network"])  # the others wait for it
    assert sum((r["slowest"], r["host"], r["reason"]) == (rank, f"h{rank}", reason) for r in found) >= 4
    told = [record["message"] for record in records if record["kind"] == "warning"]
    words = {"data": "waiting for data", "compute": "computing"}[reason]
    mine = [message for message in told if message.startswith(f"rank {rank} on h{rank} is ")]
    assert mine
    assert mine[0].endswith(f"slower than the median: {words}")


def test_one_process_tells_no_ranks(tmp_path: Path) -> None:
    assert {record["kind"] for record in train(tmp_path, 1, {0: 0.01}, {})} == {"train", "eval", "digest"}
