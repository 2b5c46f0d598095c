"""Weights & Biases, online or with WANDB_MODE=offline."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from hvd_lb.track.tracker import Ending, Point, TrackedRun

_PROJECT = "hvd-lb"


class WandbTracker:
    """A run of this project, or of WANDB_PROJECT, or hvd-lb; W&B's own files are in `folder`/wandb."""

    def __init__(self, project: str | None, folder: Path):
        self._project = project or os.environ.get("WANDB_PROJECT", _PROJECT)
        self._folder = folder
        self._run: Any = None

    def open(self, run: TrackedRun, identity: str | None) -> str:
        identity = identity or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=self._project,
            dir=self._folder,
            id=identity,
            resume="allow",
            name=run.name,
            config={**run.parameters, **{f"hvd_lb.{name}": value for name, value in run.facts.items()}},
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, save_code=False),
        )
        # Steps of ours: its own must increase from one call to the next.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return identity

    def numbers(self, points: Sequence[Point]) -> None:
        for step, numbers in points:
            self._run.log({"step": step, **numbers})

    def text(self, name: str, text: str) -> None:
        file = Path(self._run.dir) / name
        file.write_text(text, "utf-8")
        if name == "README.md":
            card = wandb.Artifact(f"model-card-{self._run.id}", "model-card")
            card.add_file(str(file))
            self._run.log_artifact(card)
        else:
            self._run.save(str(file), base_path=self._run.dir, policy="now")

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)
