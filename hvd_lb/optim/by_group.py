"""What optimizers that update the parameters of a group together have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Elements that a core updates at once: what each pass leaves of them is still in its cache for the next one.
_PIECE = 1 << 17


def in_pieces(*lists: Sequence[Tensor]) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Lists of equally many tensors, those at a place shaped alike, in parts for an update of several passes.

    A part has the places that its tensors had, and as many lists. On CPUs it is small, with large tensors cut in
    pieces, so that all passes together go through memory once; elementwise operations give the same bits. On other
    devices, where each operation is a kernel to launch, there is one part.
    """
    if lists[0][0].device.type != "cpu":
        yield list(range(len(lists[0]))), list(map(list, lists))
        return
    part: list[tuple[int, Sequence[Tensor]]] = []
    count, most = 0, _PIECE * torch.get_num_threads()
    for place, alike in enumerate(zip(*lists, strict=True)):
        for pieces in _cut(alike, most):
            if part and count + pieces[0].numel() > most:
                yield _unzipped(part)
                part, count = [], 0
            part.append((place, pieces))
            count += pieces[0].numel()
    if part:
        yield _unzipped(part)


def _unzipped(part: list[tuple[int, Sequence[Tensor]]]) -> tuple[list[int], list[list[Tensor]]]:
    return [place for place, _ in part], list(map(list, zip(*(pieces for _, pieces in part), strict=True)))


def _cut(alike: Sequence[Tensor], most: int) -> Iterator[Sequence[Tensor]]:
    """Pieces of at most so many elements, in the order of memory, of tensors that fill theirs in the same order."""
    first = alike[0]
    count, strides = first.numel(), first.stride()
    filled = 1 + sum((size - 1) * stride for size, stride in zip(first.shape, strides, strict=True)) == count
    if count <= most or not filled or any(of.stride() != strides for of in alike):
        return iter([alike])
    return zip(*(of.as_strided((count,), (1,)).split(most) for of in alike), strict=True)


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
