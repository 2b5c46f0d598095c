"""The run directory: names of its files, who may write into it, and where a run in it goes on.

One launching process holds the directory (an advisory lock that also the workers' launcher inherits, so it lasts as
long as anybody writes). Nothing is created before everything has been checked.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hvd_lb.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from hvd_lb.errors import UserError
from hvd_lb.recipe import Recipe, differing_fields, make_recipe
from hvd_lb.reproducible import rounding_differences


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
        """Where the launching process asks the workers to end with a checkpoint: the number of a signal."""
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
        """Where a worker that fails says why."""
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

    def stored_recipe(self) -> Recipe | None:
        """The recipe of the run in here, if there is one. UserError when the folder holds something else."""
        if self.recipe.is_file():
            try:
                values = yaml.safe_load(self.recipe.read_text("utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                values = None
            if not isinstance(values, dict):
                raise UserError(f"{self.recipe} is damaged: restore it or choose another --output")
            return make_recipe(values, str(self.recipe))
        if self.path.exists():
            if not self.path.is_dir():
                raise UserError(f"output {self.path} is a file, expected a folder: choose another --output")
            # What a start that was killed before its recipe was there may have left.
            unfinished = (".lock", "logs", f".{self.recipe.name}.writing")
            if any(entry.name not in unfinished for entry in self.path.iterdir()):
                raise UserError(
                    f"output folder {self.path} holds something that is not a run: choose an empty or new folder"
                )
        return None


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint or at step 0, and what to tell the user about it."""

    checkpoint: Checkpoint | None
    messages: list[str]

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def find_start(
    run: RunDirectory, recipe: Recipe, resume: str, total_steps: int, environment: dict[str, Any]
) -> Start:
    """Where the run in `run` begins or goes on; reads only. `resume` is "auto", a checkpoint or a run directory.

    A reproducible run that goes on in another rounding `environment` is warned about. A run that is at its end but was
    killed before summary.json was written "goes on" there: what is left is to sum it up.
    UserError when the directory holds another recipe's run or a finished one, or the checkpoint is damaged or foreign.
    """
    stored = run.stored_recipe()
    if stored and (differing := differing_fields(stored.mathematics(), recipe.mathematics())):
        raise UserError(
            f"{run.path} holds a run of another recipe ({'; '.join(differing)}): "
            "give its options again to go on with it, or choose another --output"
        )
    messages: list[str] = []
    if resume == "auto":
        checkpoint, problems = CheckpointStore(run.checkpoints).newest_intact()
        messages += problems
        if problems:
            use = f"checkpoint {checkpoint.path.name}" if checkpoint else "step 0, as no checkpoint is intact"
            messages.append(f"going on from {use} instead")
    else:
        checkpoint = open_checkpoint(_checkpoint_path(Path(resume)))
        if stored and checkpoint.path.parent != run.checkpoints.resolve():
            raise UserError(
                f"{run.path} holds a run already, and {resume} is a checkpoint of another: choose another --output"
            )
    if checkpoint:
        if differing := differing_fields(checkpoint.state["recipe"], recipe.mathematics()):
            raise UserError(f"checkpoint {checkpoint.path} is of another recipe: {'; '.join(differing)}")
        told = not stored or resume != "auto" or run.summary.exists()
        if checkpoint.step >= total_steps and told:
            raise UserError(
                f"{checkpoint.path} is at the end of this run already ({checkpoint.step} of {total_steps} steps): "
                "choose another --output to train again"
            )
        changes = rounding_differences(checkpoint.state["environment"], environment)
        if recipe.reproducible and changes:
            messages.append(
                f"{checkpoint.path.name} was made elsewhere ({'; '.join(changes)}): from here on the run is not "
                "bitwise the one it would have been there"
            )
    return Start(checkpoint, messages)


def _checkpoint_path(path: Path) -> Path:
    last = path / "checkpoints" / "last"
    return last if last.exists() else path


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
