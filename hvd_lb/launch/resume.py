"""Where a run begins or goes on: at step 0, at the newest intact checkpoint, or at one that was named."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError
from hvd_lb.exact.rounding import rounding_differences
from hvd_lb.recipe import Recipe, differing_fields, make_recipe
from hvd_lb.recipe_file import parse_values, read_text
from hvd_lb.report.run_directory import FORECAST_FILES, PASSING, RunDirectory
from hvd_lb.report.summary import ended_after
from hvd_lb.training.checkpoint import Checkpoint, CheckpointStore, open_checkpoint


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins: at a checkpoint or at step 0, and what to tell the user about it.

    `damaged` are newer checkpoints, which are set aside before the run goes on. `finished` says that there is nothing
    left to do, and is empty otherwise.
    """

    checkpoint: Checkpoint | None
    messages: list[str]
    damaged: tuple[Path, ...] = ()
    finished: str = ""

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def evaluation_due(self) -> bool:
        """Whether the evaluation of the checkpoint's step is still to come: a stop or a kill was before it."""
        return self.checkpoint is not None and self.checkpoint.saved.evaluation_due

    @property
    def first_record(self) -> int:
        """The step from which on metrics are written anew."""
        return self.step - 1 if self.evaluation_due else self.step


def find_resume_point(
    run: RunDirectory,
    recipe: Recipe,
    resume: str,
    total_steps: int,
    environment: Callable[[], dict[str, Any]],
) -> ResumePoint:
    """Where the run in `run` begins or goes on; reads only. `resume` is "auto", a checkpoint or a run directory.

    A reproducible run that goes on in another `rounding_environment` is warned about; only then is it asked for. A run
    that is at its end but was killed before summary.json was written "goes on" there: what is left is to sum it up.
    UserError when the directory holds another recipe's run, or the checkpoint is damaged, or of another run or its end.
    """
    stored = stored_recipe(run)
    if stored and (differing := differing_fields(stored.mathematics(), recipe.mathematics())):
        raise UserError(
            f"{run.path} holds a run of another recipe ({'; '.join(differing)}): "
            "give its options again to go on with it, or choose another --output"
        )
    messages: list[str] = []
    damaged: dict[Path, str] = {}
    if resume == "auto":
        checkpoint, damaged = CheckpointStore(run.checkpoints).newest_intact()
        if damaged and not checkpoint:
            raise UserError(
                f"{'; '.join(damaged.values())}; no checkpoint of {run.path} is intact, and none is thrown away: "
                "restore one, or begin anew with another --output"
            )
        messages += damaged.values()
        if damaged and checkpoint:
            messages.append(
                f"going on from checkpoint {checkpoint.path.name} instead; what is damaged is set aside"
            )
    else:
        checkpoint = open_checkpoint(_checkpoint_path(Path(resume).expanduser()))
        if stored and checkpoint.path.parent.resolve() != run.checkpoints.resolve():
            raise UserError(
                f"{run.path} holds a run already, and {resume} is a checkpoint of another: choose another --output"
            )
    if checkpoint:
        if differing := differing_fields(checkpoint.saved.recipe, recipe.mathematics()):
            raise UserError(f"checkpoint {checkpoint.path} is of another recipe: {'; '.join(differing)}")
        if rescaled := checkpoint.saved.rescaled:
            total_steps = min(rescaled["end"], recipe.steps or rescaled["end"])
        if checkpoint.step >= total_steps and not checkpoint.saved.evaluation_due:
            finished = _at_its_end(checkpoint.path, checkpoint.step, total_steps)
            if not stored:
                raise UserError(finished)
            if ended_after(run) or checkpoint.step > total_steps:
                return ResumePoint(checkpoint, [], finished=finished)
        if recipe.reproducible and (
            changes := rounding_differences(checkpoint.saved.environment, environment())
        ):
            messages.append(
                f"{checkpoint.path.name} was made with other software or hardware ({'; '.join(changes)}): from here on "
                "the run is not bitwise the one it would have been there"
            )
    elif stored and (steps := ended_after(run)) >= total_steps:  # its checkpoints were removed
        return ResumePoint(None, [], finished=_at_its_end(run.path, steps, total_steps))
    return ResumePoint(checkpoint, messages, tuple(damaged))


def _at_its_end(path: Path, steps: int, of: int) -> str:
    return f"{path} is at the end of this run already ({steps} of {of} steps): choose another --output to train again"


def stored_recipe(run: RunDirectory) -> Recipe | None:
    """The recipe of the run in there, if there is one. UserError when the folder holds something else."""
    if run.recipe.is_file():
        try:
            return make_recipe(parse_values(read_text(run.recipe), str(run.recipe)), str(run.recipe))
        except UserError as error:  # damaged, of a newer version, or changed by hand
            raise UserError(
                f"{error}; go on with the version that wrote it, restore it or choose another --output"
            ) from None
    if run.path.exists():
        if not run.path.is_dir():
            raise UserError(f"output {run.path} is a file, expected a folder: choose another --output")
        # What a start that ended before its recipe was there may have left, and a forecast of this run.
        # In the containers of --image caches are in .cache.
        unfinished = (".lock", ".cache", "logs", f".{run.recipe.name}.writing", *FORECAST_FILES)
        if any(
            entry.name not in unfinished and not entry.name.startswith(PASSING)
            for entry in run.path.iterdir()
        ):
            raise UserError(
                f"output folder {run.path} holds something that is not a run: choose an empty or new folder"
            )
    return None


def _checkpoint_path(path: Path) -> Path:
    last = path / "checkpoints" / "last"
    return last if os.path.lexists(last) else path
