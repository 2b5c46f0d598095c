"""LARS: SGD whose rate each tensor of weights scales by its own trust ratio (You, Gitman, Ginsburg 2017).

With w the weights, g the gradient, β the weight decay and c the trust coefficient (arXiv 1708.03888, section 5):
  λ = c |w| / (|g| + β |w|), and g + β w times λ takes the place of the gradient with weight decay.
A tensor whose weights or gradients are all 0 has λ = 1. Every process has all weights and the sum of all gradients, so
ratios are the same on each and need no exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_lb.optim.sgd import SGD


class LARS(SGD):
    """As `SGD`, not fused; a parameter group may have another `trust_coefficient`, and with 0 it is plain SGD.

    The paper's own momentum is form 10 without correction. ValueError for a coefficient below 0.
    """

    def __init__(
        self, params: Any, lr: float = 0.1, *, trust_coefficient: float = 0.001, **options: Any
    ) -> None:
        self.trust_coefficient = trust_coefficient
        super().__init__(params, lr, **options)
        self.defaults["trust_coefficient"] = trust_coefficient

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "trust_coefficient": self.trust_coefficient}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        trust = param_group.get("trust_coefficient", self.trust_coefficient)
        if not trust >= 0:
            raise ValueError(f"LARS was given trust_coefficient={trust}; it must be at least 0")
        super().add_param_group({**param_group, "trust_coefficient": trust})

    def _update_plain(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        trust, decay = group["trust_coefficient"], group["weight_decay"]
        if trust:
            of_weights, of_grads = torch._foreach_norm(params), torch._foreach_norm(grads)
            ratios = [
                torch.where((w > 0) & (g > 0), trust * w / (g + decay * w), torch.ones_like(w))
                for w, g in zip(of_weights, of_grads, strict=True)
            ]
            if decay:
                grads = list(torch._foreach_add(grads, params, alpha=decay))
            grads = list(torch._foreach_mul(grads, ratios))
            group = {**group, "weight_decay": 0.0}
        super()._update_plain(params, grads, states, group)
