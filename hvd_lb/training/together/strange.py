"""Whether virtual workers together are what they are apart, found by numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hvd_lb.training.models import batch_norms
from hvd_lb.training.together.group import Group

# Rounding is far below this, and what mixes workers far above.
_TOLERANCE = 1e-3
# Magnitudes below are rounding themselves, as of batch norm's outputs where all values are equal.
_NOTHING = 1e-7


@torch.no_grad()
def strange(model: nn.Module, group: Group, shape: Sequence[int], like: Tensor) -> str:
    """Why two workers together would not be the two apart; empty where they are.

    Each gets a few images of noise (`shape`: n, 3, S, S; dtype, device and memory order as of `like`), one darker than
    the other, and every module's outputs are compared. The model is in training mode; its buffers are left as they
    were. One that a forward changes, other than of batch norm, would be changed once for all workers, and not by each.
    """
    of_batch_norm = batch_norms(model)
    kept = [
        (f"{name}.{of}".lstrip("."), module, of, buffer, buffer.clone())
        for name, module in model.named_modules()
        if module not in of_batch_norm
        for of, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        found = _strange(model, group, shape, like)
        changed = [name for name, module, of, _, before in kept if not _equal(module._buffers[of], before)]
    finally:
        for _, module, of, buffer, before in kept:
            module._buffers[of] = buffer.copy_(before)
    return found or (f"its buffer {changed[0]} is changed by each forward" if changed else "")


def _equal(now: Tensor | None, before: Tensor) -> bool:
    return now is not None and torch.equal(now, before)


def _strange(model: nn.Module, group: Group, shape: Sequence[int], like: Tensor) -> str:
    found = _differs(model, model, group, shape, like)
    if found and like.dtype != torch.float64:
        # Of a few values that are nearly equal (small maps, few images) batch norm makes any rounding large: in fp64 it
        # is still small, and what mixes images is not.
        tensors = *model.named_parameters(), *model.named_buffers()
        wide = {name: of.double() for name, of in tensors if of.is_floating_point()}
        forward = partial(functional_call, model, wide)
        with suppress(RuntimeError):  # another dtype within it, or no memory: what was found counts
            found = _differs(model, forward, group, shape, like.double())
    return found


def _differs(
    model: nn.Module, forward: Callable[..., Any], group: Group, shape: Sequence[int], like: Tensor
) -> str:
    noise = torch.Generator().manual_seed(0)
    parts = [(torch.randn(*shape, generator=noise) * scale).to(like) for scale in (1.0, 3.0)]
    seeds = (1, 2)
    apart = []
    for part, seed in zip(parts, seeds, strict=True):
        group.begin([len(part)], [seed])
        apart.append(_magnitudes(model, forward, part))
    group.begin([len(part) for part in parts], seeds)
    try:
        together = _magnitudes(model, forward, torch.cat(parts))
    except (RuntimeError, ValueError) as error:
        return f"it fails on two at a time ({' '.join(str(error).split())})"
    for name, calls in together.items():
        each = [found.get(name, []) for found in apart]
        if not any(each):  # its output is as long as these are many, by chance
            continue
        if {len(calls), *map(len, each)} != {len(calls)}:
            return f"its module {name} is called more often for some images than for others"
        expected = [torch.cat(of) for of in zip(*each, strict=True)]
        for one, other in zip(calls, expected, strict=True):
            if not (one - other).abs().max() <= _TOLERANCE * (other.abs().max() + _NOTHING):
                return f"its module {name or 'as a whole'} mixes images, or draws random numbers of its own"
    return ""


def _magnitudes(model: nn.Module, forward: Callable[..., Any], x: Tensor) -> dict[str, list[Tensor]]:
    """Mean magnitude of each image in the outputs of every module, by its name, call by call."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):  # attention, and its weights
                output = output[0]
            if isinstance(output, Tensor) and output.dim() and len(output) == len(x):
                found.setdefault(name, []).append(output.double().abs().flatten(1).mean(1).cpu())

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        forward(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
