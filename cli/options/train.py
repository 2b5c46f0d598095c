"""What was typed after `hvd-lb train`, in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hvd_lb.launch.options import LaunchOptions
    from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
    from hvd_lb.launch.submit.slurm.script import SlurmOptions
    from hvd_lb.track.target import TrackTarget
    from hvd_lb_cli.options.submit import SubmitOptions


@dataclass(frozen=True)
class TrainOptions:
    """What was typed; `fields` are those of the recipe that were given."""

    fields: dict[str, Any]
    recipe: str | None
    device: Literal["auto", "cpu", "cuda"]
    processes: int | None
    output: Path | None
    resume: str
    track: tuple[TrackTarget, ...]
    launch: LaunchOptions
    submit: SubmitOptions
    slurm: SlurmOptions
    kubernetes: KubernetesOptions
