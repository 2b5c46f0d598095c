"""Digests of what a run has learnt: SHA-256 of tensors, whatever device and memory order they lie in.

Of each tensor, in the order of their names, are hashed its name, dtype and shape, each with a zero byte behind it, and
its elements in row-major order, little-endian: what a safetensors file of them holds, so that a checkpoint has the
digests of the state it was taken from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

#: How batch norm calls what it keeps beside its weights.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
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


def state_digests(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, str]:
    """Of tensors of a model's state dict and of its optimizer's: `weights`, `velocities`, and `statistics` if any.

    In float mode each process knows its own share of the statistics, and their sum only where it was formed: there a
    run has no digest of them.
    """
    kept = {name: tensor for name, tensor in model.items() if name.endswith(STATISTICS)}
    weights = {name: tensor for name, tensor in model.items() if name not in kept}
    found = {"weights": tensor_digest(weights), "velocities": tensor_digest(optimizer)}
    return {**found, "statistics": tensor_digest(kept)} if kept else found
