"""The run directory: names of its files, who may write into it, and how files are replaced as a whole.

One launching process holds the directory (an advisory lock that also the launcher of the ranks inherits, so it lasts as
long as anybody writes). Nothing is created before everything has been checked.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError


@dataclass(frozen=True)
class RunDirectory:
    """Paths in RUN/; see docs/run-directory.md for what is in them."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_images(self) -> Path:
        return self.path / "bad_images.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def job(self) -> Path:
        return self.logs / "job.json"

    @property
    def heartbeat(self) -> Path:
        return self.logs / "progress.json"

    @property
    def stop(self) -> Path:
        """Where the launching process asks the ranks to end with a checkpoint: the number of a signal."""
        return self.logs / "stop"

    @property
    def stopped(self) -> Path:
        """Where rank 0 says that the run has ended so, before its end."""
        return self.logs / "stopped.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    def error(self, rank: int) -> Path:
        """Where a rank that fails says why."""
        return self.logs / f"error-{rank:04d}.json"

    def lock(self) -> int:
        """Hold the directory, creating it; the descriptor of the lock. UserError when it cannot be written or held."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"output folder {self.path} cannot be written ({error.strerror}): choose another --output"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"output folder {self.path} is in use by another run: wait for it, or choose another --output"
            ) from None
        return descriptor


def write_json(path: Path, content: dict[str, Any]) -> None:
    replace_text(path, json.dumps(content, indent=1) + "\n")


def replace_text(path: Path, text: str, *, sync: bool = True, mode: int = 0o666) -> None:
    """Write a file so that readers and crashes see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)  # a crash's, which may have another mode
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
    os.replace(temporary, path)
