"""What processes tell each other with the gradients of each step, so that replicas that part are an error.

All processes begin with the same weights and take the same steps. In a loop of somebody's own one may do more, or else,
than others: clip, follow its own loss with a scheduler, load weights. Nothing but wrong numbers would tell.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvd_lb.world.arriving import Arriving

_UNIT = 2**30
"""Of weights in integers."""
_MOST = 2.0**20
_MARGIN = 1 / 4
"""Hosts may round otherwise, in each step, also to bf16: replicas are the same to so much of a weight's usual size."""


class Parted(RuntimeError):
    """Weights, as this parameter's, are no longer the same on all processes."""

    def __init__(self, parameter: str) -> None:
        super().__init__(
            f"weights are no longer the same on all processes, as those of {parameter} tell: load or change weights "
            "on all of them alike, or make the DistributedOptimizer afterwards, which takes rank 0's; random numbers "
            "that weights or exchanged gradients are changed by come from one seed"
        )
        self.parameter = parameter


@dataclass(frozen=True)
class _Sample:
    """An element of a parameter after a step."""

    parameter: Tensor
    own: Tensor
    share: int  #: a number of this process; all of them add up to 0, and so do equal elements times these


@dataclass(frozen=True)
class _Said:
    sums: Arriving[float]  #: over processes, and the own element
    options: int  #: this process's
    sample: _Sample | None
    unit: int


class Replicas:
    """Those of the processes' weights that a wrapped `optimizer` of this process updates.

    `late`: this process comes to the exchange in `step`. `changed`: it has changed gradients of the last step after
    their exchange.
    """

    riders = 5
    """Numbers in the exchange: who is late, who has changed gradients, options, who has a sample, and its share."""

    def __init__(self, optimizer: Optimizer, rank: int, size: int, seed: int) -> None:
        self._optimizer, self._rank, self._size, self._seed = optimizer, rank, size, seed
        self.late = self.changed = False
        self._options = 0
        self._sample: _Sample | None = None
        self._said: deque[_Said] = deque(maxlen=2)  # in the last exchanges

    def note(self, steps: int, parameters: Sequence[Tensor]) -> None:
        """After so many steps, before the number is counted on, with these parameters: what the next exchange tells."""
        self._options = self._options_of(steps)
        self._sample = self._draw(steps, parameters) if parameters else None

    def say(self, riders: Tensor, further: Sequence[int] = ()) -> None:
        """Sets the riders of this process, and further ones."""
        sample = self._sample
        told = [self.late, self.changed, self._options, sample is not None, 0, *further]
        riders.copy_(torch.tensor(list(map(int, told)), dtype=riders.dtype), non_blocking=True)
        if sample is not None:
            floating = riders.is_floating_point()
            number = sample.own if floating else (sample.own * _UNIT).round_()
            riders[self.riders - 1].copy_(number * sample.share)

    def hear(self, riders: Tensor) -> None:
        """Takes the sums of all processes' riders."""
        told = riders[: self.riders].double()
        if self._sample is not None:
            told = torch.cat([told, self._sample.own.to(told.device).reshape(1)])
        unit = 1 if riders.is_floating_point() else _UNIT
        self._said.append(_Said(Arriving(told, float), self._options, self._sample, unit))

    def late_ones(self) -> int:
        """How many were late in the last exchange. The host waits for it."""
        return int(self._said[-1].sums.wait()[0]) if self._said else 0

    def parted(self, at_once: bool, label: Callable[[Tensor], str]) -> RuntimeError | None:
        """Why replicas are no longer the same, if they are not; `label` names a parameter.

        By the last exchange, or by the one before, for which the host need not wait.
        """
        if len(self._said) < 2 - at_once:
            return None
        said = self._said[-1 if at_once else 0]
        _, changed, options, sampled, total, *own = said.sums.wait()
        if 0 < changed < self._size:
            return RuntimeError(
                f"{changed:.0f} of {self._size} processes have changed gradients before the last step(), as by "
                "clipping, and the others have not: their weights are no longer the same. Do it on all processes"
            )
        if options not in (said.options * self._size, said.options):  # others have taken no step yet
            rates = ", ".join(f"{float(group['lr']):g}" for group in self._groups if "lr" in group)
            return RuntimeError(
                "processes have taken the last step() with other options of the optimizer than rank "
                f"{self._rank} (its lr: {rates}), so their weights are no longer the same: give schedulers "
                "the same numbers everywhere, as the loss of all processes and not each its own"
            )
        if said.sample and sampled == self._size and self._is_more(total / said.unit, own[0], said.sample):
            return Parted(label(said.sample.parameter))
        return None

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _options_of(self, steps: int) -> int:
        """Ten bits of the numbers that the groups have for an option, the same where these agree to rounding.

        Other ones in each step: what has the same bits by chance has others soon. Switches do not count: torch adds
        some where a state is loaded, as it is at the start by all but rank 0.
        """
        told = [str(steps)]
        for group in self._groups:
            for name in self._optimizer.defaults:
                value = group.get(name)
                parts = value if isinstance(value, tuple) else (value,)
                numbers = [of.item() if _on_host(of) else of for of in parts]
                told += [
                    f"{float(number):.6g}"
                    for number in numbers
                    if isinstance(number, int | float) and not isinstance(number, bool)
                ]
        return zlib.crc32(" ".join(told).encode()) % 1024

    @torch.no_grad()
    def _draw(self, steps: int, parameters: Sequence[Tensor]) -> _Sample | None:
        """An element of one parameter, in turn: one that differs is found in as many steps as there are parameters."""
        parameter = parameters[steps % len(parameters)]
        if not parameter.numel():
            return None
        place, offset = self._number(steps) % parameter.numel(), parameter.storage_offset()
        for size, stride in zip(parameter.shape, parameter.stride(), strict=True):
            place, index = divmod(place, size)
            offset += index * stride
        element = parameter.detach().as_strided((), (), offset).to(torch.float64, copy=True)
        own = element.nan_to_num_(0.0).clamp_(-_MOST, _MOST)
        # Shares are what neighbours in the ring of ranks differ by, so all together are 0.
        after = (self._rank + 1) % self._size
        share = self._number(steps, self._rank) % 4 - self._number(steps, after) % 4
        return _Sample(parameter, own, share)

    def _number(self, *of: int) -> int:
        """A random number of a step, or of a rank in it."""
        text = repr((self._seed, *of)).encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")

    @torch.no_grad()
    def _is_more(self, total: float, own: float, sample: _Sample) -> bool:
        """Whether shares add up to more than rounding makes of them."""
        if abs(total) <= _MARGIN * abs(own):
            return False
        weights = sample.parameter.detach()
        usual = float(torch.linalg.vector_norm(weights, dtype=torch.float64)) / math.sqrt(weights.numel())
        return not abs(total) <= _MARGIN * max(usual, abs(own))


def _on_host(value: Any) -> bool:
    """Whether it is a number in a tensor, and nobody has to wait to know it."""
    return isinstance(value, Tensor) and value.is_cpu and value.numel() == 1
