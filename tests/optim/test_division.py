"""Optimizers that divide while they update: nobody sees anything else than where gradients are divided before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from together import together
from torch import Tensor, nn
from torch.optim import Optimizer

from hvd_lb.optim import SGD, DistributedOptimizer, parameter_groups
from hvd_lb.world import World
from hvd_lb.world.solo import Solo

MAKERS: dict[str, Callable[[nn.Module, bool], Optimizer]] = {
    "ours": lambda model, fused: SGD(parameter_groups(model, 0.01), 0.1, fused=fused),
    "torch's SGD": lambda model, fused: torch.optim.SGD(
        model.parameters(), 0.1, 0.9, fused=fused, foreach=False
    ),
    "torch's Adam": lambda model, fused: torch.optim.Adam(model.parameters(), fused=fused, foreach=False),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4)).double()


def images(seed: int) -> Tensor:
    return torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def watched_sums(opt: DistributedOptimizer) -> bool:
    return opt._phase.value == "global sums"


def looks(opt: DistributedOptimizer, model: nn.Module) -> None:
    """Somebody reads the gradients."""
    assert all(p.grad is not None for p in model.parameters())


def clips(opt: DistributedOptimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def replaces(opt: DistributedOptimizer, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = p.grad * 0.5


ACTS: dict[str, Callable[[DistributedOptimizer, nn.Module], None]] = {
    "nothing": lambda opt, model: None,
    "looks": looks,
    "clips": clips,
    "replaces": replaces,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("alone", [False, True])
def test_the_same_steps_and_gradients(name: str, act: str, alone: bool) -> None:
    drawn = network()  # threads share the generator

    def run(world: World) -> None:
        models = [copy.deepcopy(drawn), copy.deepcopy(drawn)]
        opts = [
            DistributedOptimizer(MAKERS[name](model, fused), model, world=world, bucket_bytes=100)
            for model, fused in zip(models, (True, False), strict=True)
        ]
        for step in range(4):
            for model, opt in zip(models, opts, strict=True):
                opt.backward(model(images(10 * step + world.rank)).square().sum())
                opt.synchronize(images=5)
                assert watched_sums(opt) == (opt is opts[0])
                ACTS[act](opt, model)
                assert watched_sums(opt) == (opt is opts[0] and act == "nothing")
                opt.step()
            for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
                assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)
                assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-14)  # readable: the mean

    if alone:
        run(Solo())
    else:
        together(3, run)


def test_what_sees_gradients_within_the_step_sees_means() -> None:
    """Step hooks, and closures."""
    model = network()
    opt = DistributedOptimizer(SGD(model.parameters(), fused=True), model, world=Solo())
    seen: list[Tensor] = []
    hook = opt.register_step_pre_hook(lambda *_: seen.append(model[2].bias.grad.clone()))
    loss = model(images(0)).sum()
    opt.backward(loss)
    opt.step(images=5)
    assert torch.equal(seen[0], torch.ones(4, dtype=torch.float64))
    hook.remove()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(images(0)).sum()
        loss.backward()
        return loss

    opt.step(closure, images=5)
    assert torch.equal(model[2].bias.grad, torch.ones(4, dtype=torch.float64))


def test_a_gradient_that_is_not_the_optimizers_to_divide() -> None:
    """Of a frozen parameter, set by hand: it is used as it is."""
    model = network()
    model[0].requires_grad_(False)
    model[0].bias.grad = torch.ones(3, dtype=torch.float64)
    before = model[0].bias.clone()
    opt = DistributedOptimizer(SGD(model.parameters(), 0.1, 0.0, fused=True), model, world=Solo())
    opt.backward(model(images(0)).sum())
    opt.step(images=5)
    assert torch.allclose(model[0].bias, before - 0.1)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("loaded", [False, True])
def test_groups_that_are_not_updated_by_the_fused_kernel(
    kind: Callable[..., Optimizer], loaded: bool
) -> None:
    """By their own word, or as those of a state that was saved without it: torch's other kernels take no divisor."""

    def train(fused: bool) -> nn.Module:
        model = network()
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
        state = kind(copy.deepcopy(groups), lr=0.1).state_dict()
        if fused and not loaded:
            groups[0]["fused"] = False  # type: ignore[assignment]
        opt = DistributedOptimizer(kind(groups, lr=0.1, fused=fused), model, world=Solo())
        if loaded:
            opt.load_state_dict(state)
        for step in range(2):
            opt.backward(model(images(step)).square().sum())
            opt.step(images=5)
        return model

    for a, b in zip(train(True).parameters(), train(False).parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_giving_a_step_up_after_its_exchange() -> None:
    model, twin = network(), network()
    opt, other = (
        DistributedOptimizer(SGD(m.parameters(), fused=True), m, world=Solo()) for m in (model, twin)
    )
    for clear in (opt.zero_grad, model.zero_grad, lambda: model.zero_grad(set_to_none=False)):
        opt.backward(model(images(1)).sum())
        opt.synchronize(images=5)
        clear()
    for m, o in ((model, opt), (twin, other)):
        o.backward(m(images(2)).sum())
        o.step(images=5)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_half_precision_is_divided_before_it_is_rounded() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    opt = DistributedOptimizer(torch.optim.SGD([w], 1.0, fused=True), world=Solo())
    for last in (False, True):
        opt.backward((w * 60000.0).sum(), last=last)
    opt.step(global_images=2)
    assert w.grad.tolist() == [60000.0, 60000.0]
    assert w.tolist() == [-60000.0, -60000.0]
