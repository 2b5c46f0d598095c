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
        """As torch's; `ValueError` for the state of another optimizer, whose words say nothing here."""
        states = [state for state in state_dict["state"].values() if state]
        # torch adds that one when a state is loaded
        options = [name for name in self.defaults if name != "differentiable"]
        expected = [(group, options) for group in state_dict["param_groups"]]
        expected += [(state, [*self._like_parameter]) for state in states]
        if missing := next((name for part, names in expected for name in names if name not in part), None):
            raise ValueError(
                f"a state dict without {missing!r} is another optimizer's: load it into that one, or what hvd_lb's "
                f"{type(self).__name__} has saved into this"
            )
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name in self._like_parameter if state else ():
                # stored ones may have lost the parameter's memory format
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
