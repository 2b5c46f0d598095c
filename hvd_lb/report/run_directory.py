"""The run directory: names of its files, who may write into it, and how files are replaced as a whole.

One launching process holds the directory (`lock`). Nothing is created before everything has been checked.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.report.lock import DirectoryLock

#: What `simulate --cluster … --output` writes; it may be there before the run is.
FORECAST_FILES = ("forecast.json", "forecast.png", "forecast.html", "step-trace.json", "device.yaml")
#: How the names begin of what hosts write to tell that they see the same folder, or to measure, and leave when killed.
PASSING = ".hvd-lb-"


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
    def forecast(self) -> Path:
        """What was foretold of the run, if anything."""
        return self.path / "forecast.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tracking(self) -> Path:
        """As what trackers know the run (`hvd_lb.track`)."""
        return self.path / "tracking.json"

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
    def launching(self) -> Path:
        """Which process launches the run (`hvd_lb.report.launching`); there while it does."""
        return self.logs / "launching.json"

    @property
    def submitted(self) -> Path:
        """As which job of a batch system the run was submitted."""
        return self.logs / "submitted.json"

    @property
    def launching_log(self) -> Path:
        """What that process says."""
        return self.logs / "launching.log"

    @property
    def stop(self) -> Path:
        """Where a run is asked to end (`hvd_lb.launch.stopping`)."""
        return self.logs / "stop"

    @property
    def stopped(self) -> Path:
        """Where rank 0 says that the run has ended so, before its end."""
        return self.logs / "stopped.json"

    @property
    def ranks(self) -> Path:
        """What each rank is doing, as far as it tells: `launch/agent/record`."""
        return self.logs / "ranks.json"

    @property
    def endings(self) -> Path:
        """How each rank ended, and which hosts were lost, a line each in the order in which it was heard."""
        return self.logs / "endings.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    def error(self, rank: int) -> Path:
        """Where a rank that fails says why."""
        return self.logs / f"error-{rank:04d}.json"

    def hang(self, rank: int) -> Path:
        """Where a rank that does not go on says what it does; gone when it does go on."""
        return self.logs / f"hang-{rank:04d}.json"

    def lock(self) -> DirectoryLock:
        """Hold the directory, creating it. UserError when it cannot be written, or another run holds it."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            return DirectoryLock(self.path, self.logs / "lock.json")
        except OSError as error:
            raise UserError(
                f"output folder {self.path} cannot be written ({error.strerror}): choose another --output"
            ) from None

    def keep_logs(self) -> None:
        """Move what an earlier start left in logs/ into logs/attempt-N/, N from 1."""
        self.stop.unlink(missing_ok=True)
        left = [path for pattern in _OF_ONE_START for path in sorted(self.logs.glob(pattern))]
        if not left:
            return
        names = (path.name.removeprefix("attempt-") for path in self.logs.glob("attempt-*"))
        attempt = (
            self.logs / f"attempt-{max((int(name) for name in names if name.isdecimal()), default=0) + 1}"
        )
        attempt.mkdir()
        for path in left:
            path.rename(attempt / path.name)


# In logs/. Not there: what a scheduler prints, or somebody else has put there, who may be writing on.
_OF_ONE_START = (
    *("rank-*.log", "launcher.log", "launching.log"),
    *("error-*.json", "hang-*.json", "job.json", "launching.json", "progress.json", "stopped.json"),
    *("ranks.json", "endings.jsonl", "samples-*.jsonl"),
)


# What fields of these files are, whichever of them has them.
_NUMBER = (int, float)
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("exit_reason", "chain"), str),
    **dict.fromkeys(("step", "steps", "total_steps", "processes", "pid"), int),
    **dict.fromkeys(("steps_per_epoch", "global_batch", "epochs", "wall_seconds"), _NUMBER),
    **dict.fromkeys(("images_per_second", "data_wait", "since"), _NUMBER),
    **dict.fromkeys(("versions", "variables", "final", "best"), dict),
    **dict.fromkeys(("command", "hosts"), list),
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a run; empty where there is none that can be read.

    These files may be damaged or edited: fields that are not of their kind are left out.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        name: value
        for name, value in content.items()
        if value is None or name not in _KINDS or isinstance(value, _KINDS[name])
    }


def strict_json(value: Any, indent: int | None = None) -> str:
    """As JSON that everyone can read: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    replace_text(path, strict_json(content, indent=1) + "\n")


def replace_text(path: Path, text: str, *, sync: bool = True, mode: int = 0o666) -> None:
    """Write a file so that readers and crashes see the old content or the new, never a part."""
    replace_bytes(path, text.encode("utf-8"), sync=sync, mode=mode)


def replace_bytes(path: Path, content: bytes, *, sync: bool = True, mode: int = 0o666) -> None:
    """As `replace_text`. What an error leaves behind takes no room."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)  # a crash's, which may have another mode
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # write(2) does not know what it is about
            error.filename = str(path)
        with suppress(OSError):
            temporary.unlink()
        raise
