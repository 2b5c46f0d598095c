"""What optimizers that update the parameters of a group together have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ByGroup(Optimizer, ABC):
    """Dense gradients only; parameters without one are skipped, as in torch.

    `_like_parameter` names the tensors of a parameter's state that are shaped as it is.
    """

    _like_parameter: tuple[str, ...]

    @abstractmethod
    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Those of a group that have gradients; at least one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name in self._like_parameter:  # stored ones may have lost the parameter's memory format
                state[name] = torch.empty_like(parameter).copy_(state[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure` (called once, first) does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            learning = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if any(grad.is_sparse for _, grad in learning):
                raise RuntimeError(
                    f"{type(self).__name__} was given a sparse gradient; build the embedding with sparse=False"
                )
            if learning:
                self._update([p for p, _ in learning], [grad for _, grad in learning], group)
        return loss
