"""Gradients that are on their way: whoever reads or sets `p.grad` makes the optimizer finish first.

`clip_grad_norm_`, `GradScaler.unscale_`, other optimizers and people's own loops ask a parameter for its `.grad`. So
while an exchange is under way its parameters have a subclass of their own class, in which `grad` is a property; before
and after it they are what they were, and torch's fast paths, compiled graphs and copies see nothing of it.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

_GRAD: Any = Tensor.grad  # torch's own descriptor


gradient: Callable[[Tensor], Tensor | None] = _GRAD.__get__
"""`p.grad` as it is, also of a watched parameter."""

set_gradient: Callable[[Tensor, Tensor | None], None] = _GRAD.__set__
"""Sets `p.grad`, also of a watched parameter, without telling anybody."""


class Lookout:
    """Calls `look`, a method that is kept weakly, before anybody reads, sets or deletes a watched `.grad`."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = weakref.WeakMethod(look)
        self._kinds: dict[type, type] = {}
        self._watched: list[tuple[Tensor, type]] = []

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Watches these, and no others, until `end`."""
        self.end()
        self._watched = [(parameter, type(parameter)) for parameter in parameters]
        for parameter, kind in self._watched:
            if kind not in self._kinds:
                self._kinds[kind] = _watched(kind, self._look)
            parameter.__class__ = self._kinds[kind]

    def end(self) -> None:
        """Watches nothing any more."""
        for parameter, kind in self._watched:
            parameter.__class__ = kind
        self._watched.clear()


def _watched(kind: type, look: weakref.WeakMethod) -> type:
    """A subclass of a class of parameters, in which `grad` calls `look` first."""

    def tell(parameter: Tensor) -> None:
        # torch.compile asks what kind of gradient there is, and for no number of it.
        if TracingContext.try_get():
            return
        method = look()
        if method is None:  # its optimizer is gone
            parameter.__class__ = kind
        else:
            method()

    def get(parameter: Tensor) -> Tensor | None:
        if TracingContext.try_get():  # torch.compile looks at all that a parameter has, and uses none of it
            return None
        tell(parameter)
        return gradient(parameter)

    def put(parameter: Tensor, grad: Tensor | None) -> None:
        tell(parameter)
        set_gradient(parameter, grad)

    def deepcopy(parameter: Tensor, memo: dict[int, Any]) -> Tensor:
        twin = kind.__deepcopy__(parameter, memo)  # type: ignore[attr-defined]
        twin.__class__ = kind
        return twin

    body = {
        "grad": property(get, put, lambda parameter: put(parameter, None)),
        "__deepcopy__": deepcopy,
        "__module__": kind.__module__,
    }
    if kind is Tensor:  # as in nn.Parameter: results are plain tensors
        body["__torch_function__"] = torch._C._disabled_torch_function_impl
    return type(kind)(kind.__name__, (kind,), body)


class Gathering(Tensor):
    """Stands in `p.grad` for terms of a sum that is not complete: whatever is done with it is an error."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if TracingContext.try_get():  # torch.compile, as above
            return super().__torch_function__(function, types, args, kwargs)
        raise RuntimeError(
            "this gradient is being added up in fixed point and not complete: call opt.synchronize() before gradients "
            "are read or changed, opt.zero_grad() to give them up"
        )


def gathering(parameter: Tensor, dtype: torch.dtype) -> Gathering:
    """A stand-in that takes no memory, for its gradient of this dtype."""
    scalar = torch.empty((), dtype=dtype, device=parameter.device)
    return scalar.expand(parameter.shape).as_subclass(Gathering)
