"""State dicts as tensors plus JSON, for checkpoints and broadcasts without pickle; and the broadcasts."""

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hvd_lb.world import World


def flatten_state(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Takes a state dict apart: tensors by path ("state/0/velocity"), and a JSON-able skeleton of the rest.

    `state` may nest dicts (keys str or numbers), lists and tuples of tensors, numbers, strings, dtypes and None;
    anything else raises `TypeError`, which names its path. `ValueError` for two tensors of one path, as of the keys
    "a/b" and "a" with "b" in it, or 1 and "1". Tensors are detached, not copied.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if path in tensors:
                raise ValueError(
                    f"state has two tensors at {path!r}: keys with / in them make the same path as others"
                )
            tensors[path] = value.detach()
            return {"tensor": path}
        if isinstance(value, Mapping):
            wrong = [key for key in value if not isinstance(key, str | int | float)]
            if wrong:
                raise TypeError(f"state at {path!r} has the key {wrong[0]!r}; expected strings and numbers")
            return {"dict": [[key, walk(item, f"{path}/{key}".lstrip("/"))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{path}/{i}".lstrip("/")) for i, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"state at {path!r} is a {type(value).__name__}; expected tensors, numbers, strings")

    return tensors, walk(state, "")


def restore_state(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Puts together what `flatten_state` took apart; the tensors are used as they are."""
    if isinstance(skeleton, list):
        return [restore_state(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tuple":
        return tuple(restore_state(tensors, item) for item in content)
    return {key: restore_state(tensors, item) for key, item in content}


def group_sizes(skeleton: Any) -> list[int]:
    """The number of parameters in each group of an optimizer, of whose state dict this is the skeleton."""
    return [len(dict(group["dict"])["params"]) for group in dict(skeleton["dict"])["param_groups"]]


def broadcast_tensors(world: World, tensors: Mapping[str, Tensor], name: str) -> None:
    """Overwrites tensors of any dtype and memory format with rank 0's: one broadcast of bytes per device.

    `RuntimeError` names one that cannot be written.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        by_device.setdefault(tensor.device, {})[key] = tensor.detach()
    for index, group in enumerate(by_device.values()):
        packed = torch.cat([_as_bytes(tensor) for tensor in group.values()])
        if not packed.numel():
            continue
        world.broadcast(packed, f"{name}.{index}")
        parts = packed.split([tensor.numel() * tensor.element_size() for tensor in group.values()])
        for (key, tensor), part in zip(group.items(), parts, strict=True):
            source = part.clone().view(tensor.dtype).view(tensor.shape)
            try:
                with torch.no_grad():
                    _once(tensor).copy_(_once(source, tensor.stride()))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise RuntimeError(f"{key} cannot be overwritten with rank 0's: {reason}") from error


def _as_bytes(tensor: Tensor) -> Tensor:
    laid_out = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return laid_out.reshape(-1).view(torch.uint8)


def _once(tensor: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """Without the repetitions that expand() makes, where `strides` (by default its own) are 0."""
    for dimension, stride in enumerate(tensor.stride() if strides is None else strides):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))
    return tensor


def broadcast_optimizer(world: World, optimizer: Optimizer, name: str) -> None:
    """Gives every process rank 0's optimizer state and group options, whatever the others had.

    Who has the same is left alone: to load a state is to make new groups, which others of an optimizer's may not get.
    Raises TypeError on all processes where rank 0's cannot be sent (see `flatten_state`).
    """
    tensors: dict[str, Tensor] = {}
    try:
        tensors, skeleton = flatten_state(optimizer.state_dict())
        layout = {
            path: [str(t.dtype).removeprefix("torch."), [*t.shape], [*t.stride()], t.device.type]
            for path, t in tensors.items()
        }
        own = json.loads(json.dumps([skeleton, layout]))
    except (TypeError, ValueError) as error:
        own = str(error)
    sent = json.loads(world.broadcast_bytes(json.dumps(own).encode(), f"{name}.skeleton"))
    if isinstance(sent, str):
        raise TypeError(f"the optimizer's state cannot be given to other processes: {sent}")
    received = {
        path: torch.empty_strided(shape, stride, dtype=getattr(torch, dtype))
        for path, (dtype, shape, stride, _) in sent[1].items()
    }
    if world.rank == 0:
        received = {path: tensor.cpu() for path, tensor in tensors.items()}
    broadcast_tensors(world, received, f"{name}.tensors")
    if world.rank == 0 or (
        own == sent and all(torch.equal(tensors[of].cpu(), received[of]) for of in received)
    ):
        return
    there = {path: tensor.to(sent[1][path][3]) for path, tensor in received.items()}
    state = restore_state(there, sent[0])
    for group, mine in zip(state["param_groups"], optimizer.param_groups, strict=False):
        kinds = {option: type(value) for option, value in mine.items() if isinstance(value, Enum)}
        group.update({option: kind(group[option]) for option, kind in kinds.items() if option in group})
    optimizer.load_state_dict(state)
    _keep_dtypes(optimizer, state["state"])


def _keep_dtypes(optimizer: Optimizer, loaded: Mapping[int, Mapping[str, Any]]) -> None:
    """torch gives what it loads the dtype of the parameter; rank 0, which has loaded nothing, has its own."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        for name, value in loaded.get(number, {}).items():
            own = state.get(name)
            if isinstance(value, Tensor) and isinstance(own, Tensor) and own.dtype != value.dtype:
                state[name] = torch.empty_like(own, dtype=value.dtype).copy_(value)
