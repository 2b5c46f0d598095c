"""How near `plan_buckets` comes to the best partition of gradients into buckets, beside DDP's.

    python benchmarks/buckets.py [MODEL ...] [--device cuda] [--json results.json]

When each gradient comes is measured: the fastest of three backwards. What follows is computed: exchanges go one after
the other, each begins when its bucket is full, takes the same time for each byte, and a latency. The best partition is
found among all that keep the order in which gradients come. Printed is when the last exchange ends, over the duration
of backward, and of how many buckets: for networks on which all bytes take 0.3 to 3 times as long as backward, and for
latencies of 0.05 and 0.5 % of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from hvd_lb.optim.exchange.buckets import plan_buckets

MODELS = ("resnet50", "resnet18", "vit_b_16", "mobilenet_v3_small", "vgg16", "efficientnet_b0", "densenet121",
          "convnext_tiny", "resnet152", "regnet_y_8gf", "swin_t")  # fmt: skip
NETWORKS, LATENCIES = (0.3, 0.6, 1, 1.5, 3), (0.0005, 0.005)
OF_DDP = 25 * 2**20


def arrivals(model: nn.Module, images: Tensor) -> dict[Tensor, float]:
    """When the gradient of each parameter comes, as a part of backward."""
    fastest, found = float("inf"), dict[Tensor, float]()
    for _ in range(3):
        came: dict[Tensor, float] = {}

        def note(parameter: Tensor, came: dict[Tensor, float] = came) -> None:
            if parameter.is_cuda:
                torch.cuda.synchronize()
            came[parameter] = time.perf_counter()

        hooks = [p.register_post_accumulate_grad_hook(note) for p in model.parameters()]
        loss = model(images).square().sum()
        if images.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss.backward()
        seconds = max(came.values()) - began
        if seconds < fastest:
            fastest, found = seconds, {p: (at - began) / seconds for p, at in came.items()}
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return found


def end(buckets: Sequence[Sequence[Tensor]], came: dict[Tensor, float], byte: float, latency: float) -> float:
    """When the last exchange ends."""
    ended = 0.0
    for full, size in sorted((max(came[p] for p in b), sum(p.nbytes for p in b)) for b in buckets):
        ended = max(ended, full) + latency + byte * size
    return ended


def best(came: dict[Tensor, float], byte: float, latency: float) -> tuple[float, int]:
    """When it ends with the best partition, and how many buckets that has."""
    order = sorted(came, key=came.__getitem__)
    sizes = np.cumsum([0, *(p.nbytes for p in order)])
    ends, counts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, int)
    for last, parameter in enumerate(order, 1):
        with_bucket_from = np.maximum(ends[:last], came[parameter]) + byte * (sizes[last] - sizes[:last])
        first = int(with_bucket_from.argmin())
        ends[last], counts[last] = with_bucket_from[first] + latency, counts[first] + 1
    return float(ends[-1]), int(counts[-1])


def ddp_buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """As torch's DDP makes them after its first step: of 1 MiB, then of 25 MiB or more."""
    buckets: list[list[Tensor]] = [[]]
    for parameter in reversed(parameters):
        buckets[-1].append(parameter)
        if sum(p.nbytes for p in buckets[-1]) >= (2**20 if len(buckets) == 1 else OF_DDP):
            buckets.append([])
    return [bucket for bucket in buckets if bucket]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    over_best: dict[str, list[float]] = {"hvd-lb": [], "DDP": []}
    rows = []
    print(f"{'':20}{'network':>8}{'latency':>9}{'best':>14}{'hvd-lb':>14}{'DDP':>14}")
    for name in arguments.models:
        model = get_model(name, num_classes=1000).to(arguments.device)
        pixels, count = (224, 1) if name.startswith(("vit", "swin")) else (64, 8)
        came = arrivals(model, torch.randn(count, 3, pixels, pixels, device=arguments.device))
        parameters = list(model.parameters())
        sides = {"hvd-lb": plan_buckets(parameters, OF_DDP), "DDP": ddp_buckets(parameters)}
        for network, latency in itertools.product(NETWORKS, LATENCIES):
            byte = network / sum(p.nbytes for p in parameters)
            ended, buckets = best(came, byte, latency)
            row = {"best": (ended, buckets)}
            for side, plan in sides.items():
                row[side] = (end(plan, came, byte, latency), len(plan))
                over_best[side].append(row[side][0] / ended)
            rows.append({"model": name, "network": network, "latency": latency, **row})
            cells = "".join(f"{at:8.3f} ({of:3})" for at, of in row.values())
            print(f"{name:20}{network:8}{latency:9.2%}{cells}", flush=True)
    for side, ratios in over_best.items():
        print(f"{side}: {statistics.mean(ratios):.3f} of the best on average, {max(ratios):.3f} at worst")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
