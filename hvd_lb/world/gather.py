"""Bytes between processes, by sums and broadcasts of tensors: what few and rare messages need, and no more."""

import numpy as np
import torch

from hvd_lb.world import World


def gather_bytes(world: World, data: bytes, name: str) -> list[bytes]:
    """The `data` of each process, by rank; collective."""
    lengths = torch.zeros(world.size, dtype=torch.int64)
    lengths[world.rank] = len(data)
    stops = world.allreduce(lengths, f"{name}.lengths").cumsum(0).tolist()
    if not stops[-1]:
        return [b""] * world.size
    starts = [0, *stops[:-1]]
    together = np.zeros(stops[-1], np.int32)  # where the others write is 0 here; Horovod sums no bytes
    together[starts[world.rank] : stops[world.rank]] = np.frombuffer(data, np.uint8)
    summed = world.allreduce(torch.from_numpy(together), f"{name}.bytes")
    whole = summed.numpy().astype(np.uint8).tobytes()
    return [whole[start:stop] for start, stop in zip(starts, stops, strict=True)]


def broadcast_bytes(world: World, data: bytes, name: str) -> bytes:
    """Rank 0's `data`, on every process; collective."""
    length = int(world.broadcast(torch.tensor([len(data)]), f"{name}.length").item())
    if length == 0:
        return b""
    if world.rank == 0:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    else:
        buffer = torch.empty(length, dtype=torch.uint8)
    return world.broadcast(buffer, f"{name}.bytes").numpy().tobytes()
