"""What loaders do on a GPU they do on one stream, beside the network's."""

from __future__ import annotations

from functools import cache

import torch


@cache
def loading_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all loaders of a device: memory that was used on one stream is not used again on another."""
    return torch.cuda.Stream(device)
