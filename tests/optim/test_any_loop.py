"""Training loops drawn at random: whatever is typed, on however many processes, the weights are plain torch's.

A loop has processes with unlike microbatches, or none, in a step; branches of the network that some of these take; one
that is unfrozen, one that is frozen, one whose group is added on the way; all ways to clear gradients; sums that are
looked at, clipped or changed before the update; steps that are given up; optimizers made anew from a state dict;
models that are moved; a GradScaler. Another seed, another loop.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_distributed import NOTHING
from together import Together, together
from torch import Tensor, nn

from hvd_lb.exact.fixed_point import FixedPointOverflow
from hvd_lb.optim import SGD, DistributedOptimizer

NEVER = 99
INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "form 10": lambda groups: SGD(groups, weight_decay=0.01),
    "fused": lambda groups: SGD(groups, weight_decay=0.01, fused=True),
    "form 9": lambda groups: SGD(groups, weight_decay=0.01, form=9, nesterov=False),
    "torch's SGD": lambda groups: torch.optim.SGD(groups, 0.1, 0.9, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.01),
}


@dataclass(frozen=True)
class Microbatch:
    seed: int
    images: int
    branches: tuple[int, ...]  # that its images go through
    late: bool  # whether also through the one that is unfrozen

    def loss(self, model: Network) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.images, 3, 6, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 5, (self.images,), generator=generator)
        return F.cross_entropy(model(x, self.branches, self.late), y, reduction="sum")


@dataclass(frozen=True)
class Step:
    shares: list[list[Microbatch]]  # of each process
    backward: str
    then: str  # what happens between exchange and update
    lr: float
    moved: str
    beside: bool  # gradients of another kind are taken meanwhile
    given_up: bool
    anew: bool

    @property
    def images(self) -> int:
        return sum(of.images for share in self.shares for of in share)


@dataclass(frozen=True)
class Loop:
    steps: list[Step]
    unfreezes: int
    freezes: int
    adds: int
    clear: str
    inner: str
    terms: int | None
    bucket_bytes: int
    scaled: bool

    @classmethod
    def draw(cls, seed: int) -> Loop:
        draw = random.Random(seed)
        processes = draw.choice([1, 2, 3])

        def share() -> list[Microbatch]:
            counts = [0, 1, 1, 2, 3] if processes > 1 else [1, 1, 2, 3]
            return [
                Microbatch(
                    draw.randrange(1 << 30),
                    draw.randint(1, 4),
                    tuple(branch for branch in range(3) if draw.random() < 0.6) or (0,),
                    draw.random() < 0.5,
                )
                for _ in range(draw.choice(counts))
            ]

        def step() -> Step:
            shares = [share() for _ in range(processes)]
            if not any(shares):
                shares[0] = [Microbatch(1, 2, (0,), False)]
            return Step(
                shares,
                draw.choice(["by the optimizer", "accumulated", "plain"]),
                draw.choice(["", "", "synchronize", "clip", "halve"]),
                draw.choice([0.1, 0.2, 0.05, 0.0]),
                draw.choice([""] * 8 + ["channels_last", "cloned"]),
                draw.random() < 0.3,
                draw.random() < 0.15 and all(shares),
                draw.random() < 0.15,
            )

        return cls(
            [step() for _ in range(draw.randint(3, 6))],
            draw.choice([0, 1, 2, 3, NEVER]),
            draw.choice([NEVER, NEVER, 2, 3]),
            draw.choice([NEVER, NEVER, 1, 2]),
            draw.choice(list(NOTHING)),
            draw.choice(list(INNER)),
            draw.choice([None, 64]),
            draw.choice([200, 25 << 20]),
            draw.random() < 0.25,
        )

    def begin(self, model: Network) -> list[dict[str, Any]]:
        """Freezes what does not learn at first; the groups of the others."""
        model.late.requires_grad_(self.unfreezes == 0)
        model.branches[2].requires_grad_(self.adds == NEVER)
        later = {*model.branches[2].parameters()} if self.adds != NEVER else set()
        return [{"params": [p for p in model.parameters() if p not in later]}]

    def before(self, number: int, model: Network, opt: torch.optim.Optimizer) -> None:
        """What is changed between steps."""
        if number == self.unfreezes:
            model.late.requires_grad_(True)
        if number == self.freezes:
            for p in model.branches[1].parameters():
                p.requires_grad_(False)
                p.grad = None
        if number == self.adds:
            model.branches[2].requires_grad_(True)
            opt.add_param_group({"params": list(model.branches[2].parameters())})
        for group in opt.param_groups:
            group["lr"] = self.steps[number].lr * (0.1 if self.inner == "AdamW" else 1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.branches = nn.ModuleList([nn.Linear(4, 5) for _ in range(3)])
        self.late, self.shared = nn.Linear(4, 5), nn.Parameter(torch.empty(5))
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0, 0.5, generator=generator)

    def forward(self, x: Tensor, branches: Iterable[int], late: bool) -> Tensor:
        h = self.stem(x).mean((2, 3))
        y = torch.stack([self.branches[branch](h) for branch in branches]).sum(0) * self.shared
        return y + self.late(h) if late else y


def clip(opt: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], 0.05)


def halve(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


def again(opt: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """For another optimizer of the same parameters: the groups, and the state."""
    return [{"params": group["params"]} for group in opt.param_groups], copy.deepcopy(opt.state_dict())


def by_torch(loop: Loop) -> list[Tensor]:
    """The weights after the loop, by all images in one process."""
    model = Network()
    opt = INNER[loop.inner](loop.begin(model))
    for number, step in enumerate(loop.steps):
        loop.before(number, model, opt)
        if step.anew:
            groups, state = again(opt)
            opt = INNER[loop.inner](groups)
            opt.load_state_dict(state)
        for share in step.shares:
            for microbatch in share:
                (microbatch.loss(model) / step.images).backward()
        if step.given_up:
            opt.zero_grad()
            continue
        if step.then == "clip":
            clip(opt)
        if step.then == "halve":
            halve(model)
        opt.step()
        NOTHING["by hand" if loop.clear == "never" else loop.clear](model, opt)
    return [p.detach() for p in model.parameters()]


def by_hvd_lb(loop: Loop, world: Together) -> list[Tensor]:
    model = Network()

    def wrapped(groups: list[dict[str, Any]]) -> DistributedOptimizer:
        return DistributedOptimizer(
            INNER[loop.inner](groups),
            model,
            world=world,
            reproducible_terms=loop.terms,
            bucket_bytes=loop.bucket_bytes,
            skip_on_device=True,
        )

    opt = wrapped(loop.begin(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=loop.scaled)
    scaler.scale(torch.zeros(1))  # which makes its scale, also where the first step has no images
    for number, step in enumerate(loop.steps):
        loop.before(number, model, opt)
        if step.anew:
            if loop.clear == "never":  # torch's optimizers do not know either that they were used
                opt.zero_grad()
            groups, state = again(opt)
            opt = wrapped(groups)
            opt.load_state_dict(state)
        if step.moved == "channels_last":
            model.stem.to(memory_format=torch.channels_last)
        if step.moved == "cloned":
            for p in model.parameters():
                p.data = p.data.clone()
        share = step.shares[world.rank]
        try:
            take(step, share, model, opt, scaler)
        except FixedPointOverflow:
            take(step, share, model, opt, scaler)
        if not step.given_up:
            NOTHING[loop.clear](model, opt)
    return [p.detach() for p in model.parameters()]


def take(
    step: Step,
    share: list[Microbatch],
    model: Network,
    opt: DistributedOptimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """One step of a process."""
    for place, microbatch in enumerate(share):
        last = place == len(share) - 1
        if step.beside:
            learning = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(microbatch.loss(model), learning, allow_unused=True)
        loss = scaler.scale(microbatch.loss(model))
        if step.backward == "by the optimizer":
            opt.backward(loss, last=last)
        elif last:
            loss.backward()
        else:
            with opt.accumulate():
                loss.backward()
    if step.given_up:
        opt.zero_grad()
        return
    images = {"images": sum(of.images for of in share)}
    if step.then or scaler.is_enabled():
        opt.synchronize(**images)
        images = {}
        scaler.unscale_(opt)
    if step.then == "clip":
        clip(opt)
    if step.then == "halve":
        halve(model)
    scaler.step(opt, **images)
    scaler.update()


def check(seed: int) -> None:
    loop = Loop.draw(seed)
    expected = by_torch(loop)
    for weights in together(len(loop.steps[0].shares), lambda world: by_hvd_lb(loop, world)):
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(80))
def test_any_loop_gives_the_weights_of_torch(seed: int) -> None:
    check(seed)


@pytest.mark.long
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_more(hundred: int) -> None:
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        check(seed)
