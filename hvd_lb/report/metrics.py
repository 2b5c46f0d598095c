"""metrics.jsonl and TensorBoard: one JSON line per record, appended as it happens (docs/run-directory.md)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvd_lb.report.run_directory import RunDirectory, replace_text

_HEARTBEAT_SECONDS = 0.5


class RunObserver:
    """Rank 0's observer: writes what the trainer says into the run directory."""

    def __init__(self, run: RunDirectory, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # here: only rank 0 needs it, and torch

        self._run = run
        self._lines = run.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step)
        self._beat = 0.0

    def train(self, record: dict[str, Any]) -> None:
        self._write("train", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._write("eval", record)

    def checkpoint(self, record: dict[str, Any]) -> None:
        self._write("checkpoint", record)

    def repeat(self, record: dict[str, Any]) -> None:
        self._write("repeat", record)

    def rollback(self, record: dict[str, Any]) -> None:
        self._write("rollback", record)
        truncate_metrics(self._run.bad_images, record["to"])

    def warning(self, record: dict[str, Any]) -> None:
        self._write("warning", record)

    def bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        with self._run.bad_images.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
            lines.flush()
            os.fsync(lines.fileno())

    def microbatch(self, step: int, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self._beat >= _HEARTBEAT_SECONDS:
            self._beat = now
            text = json.dumps({"step": step, "microbatch": done, "microbatches": of})
            replace_text(self._run.heartbeat, text, sync=False)

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps({"kind": kind, **record}) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{kind}/{name}", value, record["step"])


class SilentObserver:
    """The observer of every other rank."""

    def train(self, record: dict[str, Any]) -> None:
        pass

    def evaluation(self, record: dict[str, Any]) -> None:
        pass

    def checkpoint(self, record: dict[str, Any]) -> None:
        pass

    def repeat(self, record: dict[str, Any]) -> None:
        pass

    def rollback(self, record: dict[str, Any]) -> None:
        pass

    def warning(self, record: dict[str, Any]) -> None:
        pass

    def bad_images(self, records: Sequence[dict[str, Any]]) -> None:
        pass

    def microbatch(self, step: int, done: int, of: int) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records that count: not those of steps that were taken again after a rollback, nor a line cut short."""
    records: list[dict[str, Any]] = []
    for record in _records(path) if path.exists() else ():
        if record.get("kind") == "rollback":
            records = [old for old in records if old["kind"] == "rollback" or old["step"] < record["to"]]
        records.append(record)
    return records


def truncate_metrics(path: Path, first_step: int, *, evaluation_due: bool = False) -> None:
    """Remove the records of steps from `first_step` on: the run goes on from there and writes them again.

    With `evaluation_due` the evaluation after the step before, too.
    """
    if not path.exists():
        return

    def of_evaluation(record: dict[str, Any]) -> bool:
        return "eval" in (record.get("kind"), record.get("of"))

    kept = [
        record
        for record in _records(path)
        if record["step"] < first_step - (1 if evaluation_due and of_evaluation(record) else 0)
    ]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


class MetricsFollower:
    """Reads the records of a growing metrics file as they come, from those of step `first_step` on."""

    def __init__(self, path: Path, first_step: int):
        self._path, self._first_step = path, first_step
        self._offset = 0

    def new_records(self) -> list[dict[str, Any]]:
        if not self._path.exists() or os.path.getsize(self._path) <= self._offset:
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = (json.loads(line) for line in whole.splitlines())
        return [record for record in records if record["step"] >= self._first_step]
