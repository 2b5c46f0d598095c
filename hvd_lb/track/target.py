"""Where a run is to be tracked besides its directory: what `--track` may say, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Self, get_args
from urllib.parse import urlsplit

from hvd_lb.errors import UserError, nearest

TrackerKind = Literal["mlflow", "wandb", "tensorboard"]


@dataclass(frozen=True)
class TrackTarget:
    """A tracker, and what it is told after the colon: MLflow's URI, W&B's project or TensorBoard's folder."""

    kind: TrackerKind
    where: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`mlflow`, `mlflow:URI`, `wandb`, `wandb:PROJECT`, `tensorboard` or `tensorboard:FOLDER`; else UserError."""
        name, colon, where = text.partition(":")
        for kind in get_args(TrackerKind):
            if name == kind and bool(colon) == bool(where):
                if kind == "mlflow" and where and urlsplit(where).password is not None:
                    raise UserError(
                        "--track mlflow: the URI has a password, which everybody could read in the run directory; set "
                        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or all of it as MLFLOW_TRACKING_URI"
                    )
                return cls(kind, where or None)
        raise UserError(
            f"--track {text}: expected mlflow[:URI], wandb[:PROJECT] or tensorboard[:FOLDER]"
            f"{nearest(name, get_args(TrackerKind)) if name not in get_args(TrackerKind) else ''}"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}" if self.where else self.kind


def track_targets(texts: Sequence[str]) -> tuple[TrackTarget, ...]:
    """Those of all `--track`; UserError for one that is none, or is there twice."""
    targets = tuple(map(TrackTarget.parse, texts))
    twice = [str(target) for number, target in enumerate(targets) if target in targets[:number]]
    if twice:
        raise UserError(f"--track {twice[0]} is given twice: leave one of them out")
    return targets


def refuse_untracked(targets: Sequence[TrackTarget]) -> None:
    """UserError where a package is missing, or what W&B would ask a person for."""
    for target in targets:
        if find_spec(target.kind) is None:
            raise UserError(
                f"--track {target.kind} needs the package {target.kind}: pip install 'hvd-lb[{target.kind}]'"
            )
        if target.kind == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            import wandb

            if not wandb.api.api_key:
                raise UserError(
                    "--track wandb: there is no key for W&B here: type `wandb login` before, or set WANDB_API_KEY, or "
                    "WANDB_MODE=offline"
                )
