"""Digests of what a run has learnt: SHA-256 of tensors, whatever device and memory order they lie in.

Of each tensor, in the order of their names, are hashed its name, dtype and shape, each with a zero byte behind it, and
its elements in row-major order, little-endian: what a safetensors file of them holds, so that a checkpoint has the
digests of the state it was taken from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: How batch norm calls what it keeps beside its weights.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements that are widened at once
#: The parts of a state that have a digest each.
PARTS = ("weights", "velocities", "statistics")


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits; the same only for the same names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def integer_digest(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor two numbers of 64 bits, int64 (2 · tensors,) on their device: a digest that needs one pass there.

    The sum of its elements' bits, taken as integers, and their sum weighted by place, both modulo 2^64. One element
    that differs changes the first; several go unseen only where both sums happen to agree. Who wants to deceive can:
    against that there is `tensor_digest`.
    """
    sums = [part for tensor in tensors for part in _sums(tensor)]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    plain, weighted = (torch.zeros((), dtype=torch.int64, device=bits.device) for _ in range(2))
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + part.numel(), device=bits.device)
        plain += part.sum()
        weighted += part.mul(places).sum()
    return plain, weighted


def state_digests(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, str]:
    """Of tensors of a model's state dict and of its optimizer's: `weights`, `velocities`, and `statistics` if any.

    In float mode each process knows its own share of the statistics, and their sum only where it was formed: there a
    run has no digest of them.
    """
    kept = {name: tensor for name, tensor in model.items() if name.endswith(STATISTICS)}
    weights = {name: tensor for name, tensor in model.items() if name not in kept}
    found = {"weights": tensor_digest(weights), "velocities": tensor_digest(optimizer)}
    return {**found, "statistics": tensor_digest(kept)} if kept else found
