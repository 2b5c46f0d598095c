"""LAMB: Adam whose step each tensor of weights scales by its own trust ratio (You et al. 2020, arXiv 1904.00962).

With w the weights, g the gradient, λ the weight decay and η the rate (algorithm 2, with φ the identity):
  m ← β₁ m + (1 − β₁) g     v ← β₂ v + (1 − β₂) g²     r = m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε) + λ w
  w ← w − η (|w| / |r|) r
A tensor whose w or r is all 0 has the ratio 1. As with LARS every process has all weights and the sum of all gradients,
so ratios are the same on each and need no exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_lb.optim.by_group import ByGroup


class LAMB(ByGroup):
    """Every option may differ between parameter groups; with `trust=False` a group's ratios are 1: Adam, its decay
    within the step and not in the gradient.

    Per-parameter state: `first` and `second` (m and v, shaped like the parameter) and `step` (t). Parameters without a
    gradient are skipped, as in torch. ValueError for numbers out of range.
    """

    _like_parameter = ("first", "second")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        trust: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            if not options[name] >= 0:
                raise ValueError(f"LAMB was given {name}={options[name]}; it must be at least 0")
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(f"LAMB was given betas={options['betas']}; both must be in [0, 1)")
        super().add_param_group(param_group)

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if "step" not in state:
                state.update(first=torch.zeros_like(p), second=torch.zeros_like(p), step=0)
            state["step"] += 1
        firsts, seconds = ([state[name] for state in states] for name in ("first", "second"))
        beta, gamma = group["betas"]
        torch._foreach_mul_(firsts, beta)
        torch._foreach_add_(firsts, grads, alpha=1 - beta)
        torch._foreach_mul_(seconds, gamma)
        torch._foreach_addcmul_(seconds, grads, grads, value=1 - gamma)
        spreads = torch._foreach_div(seconds, [1 - gamma ** state["step"] for state in states])
        torch._foreach_sqrt_(spreads)
        torch._foreach_add_(spreads, group["eps"])
        steps = list(torch._foreach_div(firsts, [1 - beta ** state["step"] for state in states]))
        torch._foreach_div_(steps, spreads)
        if group["weight_decay"]:
            torch._foreach_add_(steps, params, alpha=group["weight_decay"])
        if group["trust"]:
            torch._foreach_mul_(steps, trust_ratios(params, steps))
        torch._foreach_add_(params, steps, alpha=-float(group["lr"]))


def trust_ratios(weights: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    """|w| / |r| of each tensor, and 1 where either is 0."""
    lengths = zip(torch._foreach_norm(weights), torch._foreach_norm(steps), strict=True)
    return [torch.where((w > 0) & (r > 0), w / r, torch.ones_like(w)) for w, r in lengths]
