"""Bytes of every process for all, by two sums: what few and rare messages need, and no more."""

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
