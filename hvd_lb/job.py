"""What the launching process tells its workers: one JSON file, the same for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from hvd_lb.recipe import Recipe


class Job(BaseModel):
    """A checked run: its recipe, where it writes, and on what it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Recipe
    output: Path
    device: Literal["cpu", "cuda"]
    processes: int
    threads: int
    checkpoint: Path | None
