"""Which images each step was made of, as the processes had it that gave them: `--log-samples`.

Each process appends to a file of its own in RUN/logs: before the sums of a step what its virtual workers give to it,
and after the step that it was taken. A step that was given up stands there, too, without the second.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_ATTEMPT = re.compile(r"attempt-(\d+)")


class SampleLog:
    """That of process `number` in a `generation` of its job. Lines are there when a method returns."""

    def __init__(self, logs: Path, number: int, generation: int = 0):
        self._generation = generation
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(logs / f"samples-{number:04d}.jsonl", flags, 0o644)

    def given(self, step: int, images: Mapping[int, Sequence[int]]) -> None:
        """To this step, by virtual worker; in place of what was given before, if it is taken again."""
        self._write({"step": step, "images": {worker: list(ids) for worker, ids in images.items()}})

    def taken(self, step: int) -> None:
        self._write({"taken": step})

    def close(self) -> None:
        os.close(self._file)

    def _write(self, entry: dict[str, Any]) -> None:
        os.write(self._file, json.dumps({"generation": self._generation, **entry}).encode() + b"\n")


def samples_of(run: Path) -> dict[int, dict[int, list[list[int]]]]:
    """By step, then by virtual worker: the images that each process gave which counts, as the run has it in the end.

    A step that was taken several times, as the run went back, counts as it was taken last.
    """
    found: dict[int, dict[int, list[list[int]]]] = {}
    for logs in _starts(run / "logs"):
        given: dict[tuple[int, int], dict[str, dict[str, list[int]]]] = {}
        taken: dict[int, int] = {}
        for process, entry in _entries(logs):
            generation = entry["generation"]
            if "taken" in entry:
                taken[entry["taken"]] = max(generation, taken.get(entry["taken"], 0))
            else:
                given.setdefault((generation, entry["step"]), {})[process] = entry["images"]
        for step, generation in taken.items():
            found[step] = {}
            for images in given.get((generation, step), {}).values():
                for worker, ids in images.items():
                    found[step].setdefault(int(worker), []).append(ids)
    return found


def _starts(logs: Path) -> list[Path]:
    """Folders with the logs of one start each, in their order."""
    earlier = [path for path in logs.glob("attempt-*") if _ATTEMPT.fullmatch(path.name)]
    return [*sorted(earlier, key=lambda path: int(path.name.removeprefix("attempt-"))), logs]


def _entries(logs: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines, with the file they are in."""
    for path in sorted(logs.glob("samples-*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            yield path.name, json.loads(line)
