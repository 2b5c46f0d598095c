"""How accurate sums in fixed point are: the gradients of a real step, against their sum in float64.

`python benchmarks/fixed_point.py [MODEL]` (resnet20) takes three steps with 256 virtual workers of 4 digits each, adds
the fp32 gradients of the third in fixed point, in fp32 one after the other, and in float64, and prints the errors of
the first two: the largest, relative to the largest element of each tensor, and the median relative to the element.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from hvd_lb.data.dataset import open_dataset
from hvd_lb.data.loading.contract import Preprocessing
from hvd_lb.data.loading.open import open_loader
from hvd_lb.exact.fixed_point import FixedPointSum
from hvd_lb.optim import SGD, parameter_groups
from hvd_lb.plan.augment import Microbatch, RandomWindows
from hvd_lb.plan.samples import SamplePlan
from hvd_lb.training.models import build_model
from hvd_lb.world.solo import Solo

WORKERS, IMAGES, STEPS = 256, 4, 3


def main(name: str) -> None:
    torch.manual_seed(0)
    train = open_dataset("digits").train
    model = build_model(name, 10, seed=0).train()
    parameters = list(model.parameters())
    optimizer = SGD(parameter_groups(model), lr=0.1)
    plan, windows = SamplePlan(len(train), WORKERS, IMAGES, 0), RandomWindows(0, (0.6, 1.0))

    def microbatches() -> list[Microbatch]:
        ids = [plan.image_ids(epoch, 0, worker) for epoch in range(STEPS) for worker in range(WORKERS)]
        return [Microbatch(i, windows.windows(0, i, train.widths[i], train.heights[i])) for i in ids]

    pixels = Preprocessing(16, (0.3, 0.3, 0.3), (0.4, 0.4, 0.4), True)
    fixed = FixedPointSum([p.detach() for p in parameters], WORKERS, "gradients", Solo())
    loader = open_loader(
        "dali", train, microbatches(), pixels, batch_size=IMAGES, device=torch.device("cpu"), threads=1
    )
    sums = [torch.zeros_like(p) for p in parameters]
    for _ in range(STEPS):
        plain = [torch.zeros_like(p) for p in parameters]
        exact = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for _ in range(WORKERS):
            x, y = next(loader)
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), parameters)
            for index, gradient in enumerate(gradients):
                fixed.add(index, gradient)
                plain[index] += gradient
                exact[index] += gradient
        fixed.start(Solo())
        _, overflowed = fixed.finish(sums)
        if overflowed:
            raise SystemExit(f"the sums of {overflowed} overflowed")
        for parameter, total in zip(parameters, exact, strict=True):
            parameter.grad = (total / (WORKERS * IMAGES)).float()
        optimizer.step()
    loader.close()
    for title, found in (("fixed point", sums), ("fp32 one after the other", plain)):
        errors = [(a.double() - b).abs() for a, b in zip(found, exact, strict=True)]
        worst = max(float(e.max() / b.abs().max()) for e, b in zip(errors, exact, strict=True))
        relative = torch.cat([(e / b.abs()).flatten() for e, b in zip(errors, exact, strict=True)])
        typical = float(relative[relative.isfinite()].median())
        print(f"{name}, {WORKERS} terms, {title}: largest error {worst:.1e} of a tensor's largest element, "
              f"median {typical:.1e} of the element")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="resnet20")
    main(parser.parse_args().model)
