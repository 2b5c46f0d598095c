"""The tensors of two checkpoints: bitwise equal or not, and how far apart; one pair in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_lb.training.checkpoint import Checkpoint, open_tensors

# Not among the fields told: checksums of what is compared anyway, and what is told elsewhere.
_STATE_ELSEWHERE = {"checksums", "recipe", "step"}
# Integers as wide as an element: the same bits are the same number, also where floats say NaN != NaN or 0.0 == -0.0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Batch norm's statistics are far larger than weights and would always be named first.
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class TensorComparison:
    """One tensor of the file `model` or `optimizer`: how many of its elements differ, and at most by how much.

    `largest` is NaN where one run has a NaN and the other not the same one, and 0 where only the sign of a zero
    differs. `scale` is the largest finite absolute value in either run. `layout` says why elements could not be
    compared: other dtypes or shapes, or a tensor that only one of the two has.
    """

    file: str
    name: str
    elements: int
    differing: int = 0
    largest: float = 0.0
    scale: float = 0.0
    floating: bool = True
    layout: str | None = None

    @property
    def equal(self) -> bool:
        """Bitwise, with the same dtype and shape."""
        return not (self.differing or self.layout)

    @property
    def is_weight(self) -> bool:
        """One of the model's weights: no counter, no running statistic, nothing of the optimizer."""
        return self.file == "model" and self.floating and not self.name.endswith(_STATISTICS)

    @property
    def relative(self) -> float:
        """The largest difference as a share of the tensor's largest value."""
        return self.largest / self.scale if self.scale else self.largest


@dataclass(frozen=True)
class CheckpointComparison:
    """Two checkpoints: their steps, the number of tensors, those that differ (worst first).

    `state` names the fields of state.json that differ; some do for good reasons, such as another period of metrics.
    """

    steps: tuple[int, int]
    tensors: int
    differing: list[TensorComparison]
    state: list[str]

    @property
    def worst(self) -> TensorComparison | None:
        """The weight with the largest difference, or another tensor where all weights are the same."""
        measured = [tensor for tensor in self.differing if not tensor.layout]
        return next((tensor for tensor in measured if tensor.is_weight), next(iter(measured), None))


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> CheckpointComparison:
    """Every tensor of every file of two verified checkpoints."""
    files = sorted({file.name for checkpoint in (a, b) for file in checkpoint.path.glob("*.safetensors")})
    tensors = [tensor for file in files for tensor in _compare_files(a.path / file, b.path / file)]
    differing = sorted((tensor for tensor in tensors if not tensor.equal), key=_worst_first)
    fields = sorted({*a.state, *b.state} - _STATE_ELSEWHERE)
    state = [name for name in fields if _text(a.state.get(name)) != _text(b.state.get(name))]
    return CheckpointComparison((a.step, b.step), len(tensors), differing, state)


def compare_tensors(file: str, name: str, a: Tensor, b: Tensor) -> TensorComparison:
    """Two tensors of the same dtype and shape."""
    x, y = a.reshape(-1), b.reshape(-1)
    bits = _BITS[a.element_size()]
    unequal = x.view(bits) != y.view(bits)
    differing = int(unequal.sum())
    if not differing:
        return TensorComparison(file, name, a.numel())
    return TensorComparison(
        file,
        name,
        a.numel(),
        differing,
        # max() hands a NaN on.
        largest=(x[unequal].double() - y[unequal].double()).abs().max().item(),
        scale=max(_largest_finite(x), _largest_finite(y)),
        floating=a.is_floating_point(),
    )


def _compare_files(a: Path, b: Path) -> Iterator[TensorComparison]:
    """Every tensor that is in either file."""
    with _open(a) as left, _open(b) as right:
        names_a, names_b = set(left.keys()), set(right.keys())
        for name in sorted(names_a | names_b):
            if name not in names_a or name not in names_b:
                only = "only in A" if name in names_a else "only in B"
                yield TensorComparison(a.stem, name, 0, layout=only)
            elif (layout_a := _layout(left, name)) != (layout_b := _layout(right, name)):
                yield TensorComparison(a.stem, name, 0, layout=f"{layout_a} → {layout_b}")
            else:
                yield compare_tensors(a.stem, name, left.get_tensor(name), right.get_tensor(name))


def _open(file: Path) -> AbstractContextManager[Any]:
    return open_tensors(file) if file.exists() else nullcontext({})


def _layout(file: Any, name: str) -> str:
    part = file.get_slice(name)
    return f"{part.get_dtype()} {part.get_shape()}"


def _largest_finite(values: Tensor) -> float:
    values = values.double()
    finite = values[values.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _worst_first(tensor: TensorComparison) -> tuple[Any, ...]:
    """What cannot be compared, then weights by their largest difference, NaN before all; counters come last."""
    largest = math.inf if math.isnan(tensor.largest) else tensor.largest
    return tensor.layout is None, not tensor.floating, -largest, tensor.file, tensor.name


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
