"""What the launching process tells the ranks: one JSON file, the same for all of them.

It is readable by its owner alone: `environment` may hold secrets, which are kept off command lines for the same reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from hvd_lb.recipe import Recipe
from hvd_lb.world.engine import Engine

Task = Literal["train", "network", "alike"]


class Job(BaseModel):
    """A checked run: its recipe, where it writes, and on what it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Recipe
    output: Path
    device: Literal["cpu", "cuda"]
    processes: int
    threads: int
    pin: bool  #: each rank to its share of its host's cores
    checkpoint: Path | None
    data_fingerprint: str  #: a host whose copy of the data is another would make another run
    engine: Engine  #: what exchanges tensors, if there are several processes
    starter: Literal["local", "ssh", "slurm", "launched"]
    hosts: list[tuple[str, int]]  #: filled with ranks in this order
    interfaces: dict[str, str]  #: network interface of each host
    environment: dict[str, str]
    elastic: bool = False  #: it goes on when ranks are lost
    min_processes: int = 1  #: with fewer an elastic job waits for new ones, or ends
    max_processes: int | None = None  #: of an elastic job; None: as many as at the start
    per_process: int | None = None  #: virtual workers of each process, and k follows them; None: k stays
    log_samples: bool = False  #: each rank writes which images it has given to each step
    task: Task = "train"  #: what its ranks do

    def to_json(self) -> str:
        """In ASCII: a path need not be UTF-8, and pydantic's own JSON has to be."""
        return json.dumps(self.model_dump(mode="json"), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.model_validate(json.loads(text))
