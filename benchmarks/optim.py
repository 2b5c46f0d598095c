"""A step of DistributedOptimizer against Horovod's own and against torch without any exchange.

`python benchmarks/optim.py` starts two Horovod processes on the CPU, one thread each, and prints medians over
interleaved steps and their ratios; then the same for the update of SGD alone against torch.optim.SGD. First comes the
fused update with its division by B, that of the float mode; --reproducible has the plain form 10.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Step, interleaved

import hvd_lb as lb
from hvd_lb.training.models import build_model

TURNS, WARM_UP = 20, 3
CASES = {"resnet20": (32, 32), "resnet18": (8, 64)}  # images of a process, pixels


def torch_sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(
        lb.parameter_groups(model), 0.1, 0.9, nesterov=True, **(options or {"foreach": True})
    )


def step_with(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Step:
    def step() -> None:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

    return step


def report(title: str, medians: dict[str, float]) -> None:
    if lb.current().rank == 0:
        ours, *peers = medians
        figures = ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items())
        ratios = ", ".join(f"{medians[ours] / medians[peer]:.3f} of {peer}" for peer in peers)
        print(f"{title}: {figures}; {ours} takes {ratios}", flush=True)


def whole_steps() -> None:
    import horovod.torch as hvd

    for name, (images, pixels) in CASES.items():
        x, y = torch.randn(images, 3, pixels, pixels), torch.randint(0, 10, (images,))
        ours, wrapped, theirs, alone = (build_model(name, num_classes=10, seed=0) for _ in range(4))
        fused = lb.DistributedOptimizer(lb.SGD(lb.parameter_groups(ours), 0.1, fused=True), ours)
        foreach = lb.DistributedOptimizer(torch_sgd(wrapped), wrapped)
        horovod = hvd.DistributedOptimizer(torch_sgd(theirs), named_parameters=theirs.named_parameters())
        contestants = {
            "hvd-lb": step_with(ours, fused, x, y),
            "hvd-lb, torch's SGD": step_with(wrapped, foreach, x, y),
            "horovod": step_with(theirs, horovod, x, y),
            "torch alone": step_with(alone, torch_sgd(alone), x, y),
        }
        report(f"step of {name}, {images} × {pixels}×{pixels}", interleaved(contestants, TURNS, WARM_UP))


def updates() -> None:
    for name in CASES:
        runs: dict[str, Step] = {}
        for label in ("hvd-lb fused", "hvd-lb form 10", "hvd-lb form 9", "torch foreach", "torch fused"):
            model = build_model(name, num_classes=10, seed=0)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            groups = lb.parameter_groups(model)
            if label.startswith("torch"):
                runs[label] = torch_sgd(model, **{label.split()[1]: True}).step
            elif label == "hvd-lb fused":
                ours: Any = lb.SGD(groups, fused=True)
                ours.grad_scale = torch.ones(())  # the division by B, by 1, as the quotients are written back
                runs[label] = ours.step
            else:
                runs[label] = lb.SGD(groups, form=int(label.split()[-1])).step
        report(f"update of {name}", interleaved(runs, TURNS, WARM_UP))


def main() -> None:
    if "HOROVOD_RANK" in os.environ:
        torch.set_num_threads(1)
        lb.init()
        whole_steps()
        updates()
        lb.shutdown()
        return
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    horovodrun = Path(sys.executable).with_name("horovodrun")
    command = [horovodrun, "--gloo", "-np", "2", "-H", "localhost:2", "--network-interface", "lo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    raise SystemExit(
        subprocess.run([*command, sys.executable, __file__], env=environment, check=False).returncode
    )


if __name__ == "__main__":
    main()
