"""An exponential moving average of a network's weights, in terms of images and not of steps.

    e ← e + (1 − d) (w − e)        after each step, d = min(δ^(kn/256), (1 + t)/(10 + t))

δ is the decay for a minibatch of 256 images. With kn images a step does the work of kn/256 of them (Busbridge et al.
2023, arXiv 2307.13813, the EMA scaling rule), so an average reaches over the same images with every minibatch. t counts
the steps since warmup, up to whose end the average is the weights themselves, as in torchvision's reference; so what it
has of the beginning is forgotten soon, as in TensorFlow's average. Element by element: neither p nor threads matter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of `model`'s parameters, which begin as they are now; of its dtype, and once on each process.

    `decay` (δ) is for 256 images, `global_batch` is kn, and the average begins after `begins` steps.
    """

    def __init__(self, model: nn.Module, decay: float, global_batch: int, begins: int):
        self._decay, self._begins = decay ** (global_batch / 256), begins
        self._names, self._weights = map(list, zip(*model.named_parameters(), strict=True))
        self._averages = [weight.detach().clone() for weight in self._weights]

    def share(self, steps: int) -> float:
        """1 − d of the update after so many steps."""
        since = steps - self._begins
        return 1.0 if since <= 0 else 1.0 - min(self._decay, (1 + since) / (10 + since))

    @torch.no_grad()
    def update(self, share: float) -> None:
        """Moves it by this share of the way to the weights."""
        torch._foreach_lerp_(self._averages, self._weights, share)

    def tensors(self) -> dict[str, Tensor]:
        """By the parameters' names; not copied."""
        return dict(zip(self._names, self._averages, strict=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what `tensors` gave."""
        for name, average in self.tensors().items():
            average.copy_(tensors[name])
