"""The schema of state.json in a checkpoint: its format number, every field, and what older formats lack.

A new field gets a default here, so that older checkpoints can still be read; a field that changes its meaning gets a
new FORMAT. Format 1, before the reproducible mode, had one sum of losses (`loss_sum`) in place of one for each virtual
worker (`LOSSES`), and no `environment`. Tensors lie beside it: the model's in model.safetensors, in
optimizer.safetensors those of the optimizer and `LOSSES`, in model-ema.safetensors the averaged ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any

from hvd_lb.plan.run_plan import Scale

FORMAT = 2
#: Those that can be read.
FORMATS = (1, 2)

#: Among the optimizer's tensors: the sum of losses of each virtual worker since the last record, float64 (k,).
LOSSES = "losses"
#: Likewise, before the names of a network of averaged weights (--ema): in a file of their own, as the model's are.
AVERAGED = "ema/"


def counted_error(evaluation: Mapping[str, Any]) -> float | None:
    """The top-1 error that a run is judged by: of its averaged weights, where it has them."""
    return evaluation.get("ema_top1_error", evaluation.get("top1_error"))


@dataclass(frozen=True)
class SavedState:
    """What is in state.json besides what the store adds: format, step (steps done) and checksums."""

    next: dict[str, int]  #: the step to be taken next: its epoch, and its number in the epoch
    recipe: dict[str, Any]  #: `Recipe.mathematics`
    data: str  #: fingerprint of the data set: `hvd_lb.data.images.Dataset.fingerprint`
    optimizer: Any  #: the optimizer's state without its tensors: `flatten_state`
    scaler: dict[str, Any]  #: of the loss; empty but in fp16
    loss_images: int  #: images that LOSSES are over
    best_error: float | None  #: smallest top-1 error of a saved evaluation, in per cent
    evaluation: dict[str, Any] | None  #: the last one, perhaps of earlier weights
    environment: dict[str, Any] = field(
        default_factory=dict
    )  #: what the last bits depend on: `rounding_environment`
    loss_sum: float | None = None  #: of format 1: all LOSSES in one
    evaluated_at: int | None = None  #: steps done at that one; not known of older versions
    evaluation_due: bool = False  #: that of this step is still to come: a checkpoint is written before it
    gradient_norm: float | None = None  #: of the last step, where other processes still have to tell it
    left_out: list[int] = field(default_factory=list)  #: steps not taken, by --on-nan rollback
    bad_images: int = 0  #: in this epoch so far; absent from checkpoints before --on-bad-image
    batch_norm_exponents: list[int] | None = None  #: of the next sum; in reproducible runs with batch norm
    rescaled: dict[str, Any] | None = None  #: `Rescaled`, of a run whose k follows the number of processes

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None or name in _NULLABLE}

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Empty where k is the recipe's from the beginning."""
        return Rescaled.from_json(self.rescaled).scales if self.rescaled else ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SavedState:
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})


@dataclass(frozen=True)
class Rescaled:
    """Of a run whose k follows the number of processes: how many each has, and from where on k was what.

    `end` is the number of steps of its epochs if k stays as it is last; `epoch` and `images` are the position.
    """

    per_process: int
    scales: tuple[Scale, ...]
    end: int
    epoch: int
    images: int  #: of the epoch that are used

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "scales": [list(astuple(scale)) for scale in self.scales]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Rescaled:
        return cls(**{**content, "scales": tuple(Scale(*scale) for scale in content["scales"])})


# These are written as null; other fields that are None are left out.
_NULLABLE = {"best_error", "evaluation"}
