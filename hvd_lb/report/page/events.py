"""What happened to a run besides steps: starts that failed or were stopped, resumes, other numbers of processes,
rollbacks, images that stood in, warnings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lb.report.metrics import read_metrics
from hvd_lb.report.run_directory import RunDirectory, read_json
from hvd_lb.report.text import audit_in_words, count, figure, generation_in_words, rescale_in_words

#: Kinds of records of something that happened; others are curves, digests and notes.
HAPPENED = {"warning", "rollback", "repeat", "audit", "generation", "recovered", "rescale"}


@dataclass(frozen=True)
class Event:
    """At which step, None where that is not known; `kind` is one word."""

    step: int | None
    kind: str
    text: str


def events(run: RunDirectory, records: Sequence[dict[str, Any]]) -> list[Event]:
    """In the order of the steps; `records` are those of metrics.jsonl."""
    found = [*_of_starts(run), *_of_records(records), *_of_bad_images(run)]
    return sorted(found, key=lambda event: -1 if event.step is None else event.step)


def _of_records(records: Sequence[dict[str, Any]]) -> list[Event]:
    found = []
    for record in records:
        kind = str(record.get("kind"))
        if kind not in HAPPENED:
            continue
        if kind == "rollback":
            left = f", and left step {record['step']} out" if record.get("left_out") else ""
            text = f"went back to step {record['to']}{left}"
        elif kind == "audit":
            text = audit_in_words(record)
        elif kind == "generation":
            text = generation_in_words(record)
        elif kind == "rescale":
            text = rescale_in_words(record)
        elif kind == "recovered":
            text = f"taken {figure(record.get('seconds'), '.1f')} s after the change was noticed"
        else:
            text = str(record.get("message") or record.get("reason") or "") or ", ".join(
                f"{name} {value}" for name, value in record.items() if name not in ("kind", "epoch", "step")
            )
        found.append(Event(record["step"], kind, text))
    return found


def _of_starts(run: RunDirectory) -> list[Event]:
    """logs/attempt-N/ are what earlier starts left, logs/ is the last one's."""
    attempts = [path for path in run.logs.glob("attempt-*") if path.name.removeprefix("attempt-").isdecimal()]
    folders = [*sorted(attempts, key=lambda path: int(path.name.removeprefix("attempt-"))), run.logs]
    found, processes = [], None
    for number, folder in enumerate(folders):
        job = read_json(folder / "job.json")
        step = _first_step(job) if job else None
        now = job.get("processes")
        if number and job:
            changed = (
                f", {processes} → {count(now, 'process')}" if now and processes and now != processes else ""
            )
            found.append(Event(step, "resume", f"went on at step {step}{changed}"))
        processes = now or processes
        stopped = read_json(folder / "stopped.json")
        if (steps := stopped.get("steps")) is not None:
            found.append(Event(steps, "stop", f"stopped after {steps:,} steps, with a checkpoint"))
        for path in sorted(folder.glob("error-*.json"))[:1]:
            error = read_json(path)
            where = f"rank {error.get('rank')} on {error.get('host')}"
            at = _last_step(folder)
            found.append(Event(at, "failure", f"{where}: {error.get('kind')}: {error.get('message')}"))
    return found


def _first_step(job: dict[str, Any]) -> int:
    match = re.search(r"step-(\d{8})$", str(job.get("checkpoint") or ""))
    return int(match[1]) if match else 0


def _last_step(folder: Path) -> int | None:
    return read_json(folder / "progress.json").get("step")


def _of_bad_images(run: RunDirectory) -> list[Event]:
    """One for each epoch and pass."""
    records = read_metrics(run.bad_images)
    counts = Counter((record.get("epoch"), record.get("of")) for record in records)
    first = {(record.get("epoch"), record.get("of")): record["step"] for record in reversed(records)}
    return [
        Event(
            first[key],
            "stand-in",
            f"epoch {key[0]}: {count(number, 'image')} that could not be decoded"
            + (", left out of the evaluation" if key[1] == "eval" else ", others stood in"),
        )
        for key, number in counts.items()
    ]
