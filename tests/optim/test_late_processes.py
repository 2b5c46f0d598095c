"""A process without a backward that clips, or leaves it out, without `synchronize`: an error, and no replica drifts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from together import Together, together
from torch import Tensor, nn

from hvd_lb.optim import SGD, DistributedOptimizer
from hvd_lb.world.arriving import Arriving

ALONE = "rank 1 has no backward in every second step"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def by_norm(opt: DistributedOptimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def by_value(opt: DistributedOptimizer, model: nn.Module) -> None:
    if [p for p in model.parameters() if p.grad is not None]:  # of none at all it makes an error itself
        nn.utils.clip_grad_value_(model.parameters(), 0.01)


def by_assignment(opt: DistributedOptimizer, model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad = p.grad * 0.5


def only_read(opt: DistributedOptimizer, model: nn.Module) -> None:
    [p.grad.norm() for p in model.parameters() if p.grad is not None]


def or_told(run: Callable[[Together], list[Tensor]]) -> Callable[[Together], list[Tensor] | str]:
    """What a process has, or what it was told; then the others do not wait for it."""

    def told(world: Together) -> list[Tensor] | str:
        try:
            return run(world)
        except RuntimeError as error:
            world._meeting.give_up()
            return str(error)

    return told


def train(change: Callable, model: nn.Module, options: dict[str, Any]) -> list[list[Tensor] | str]:
    """The weights of three processes, or what they were told; with `waits` rank 1 calls `synchronize`."""
    options = {"waits": False, "clears": True, "sums": False, "closure": False, **options}
    terms = options.pop("reproducible_terms", None)

    def run(world: Together) -> list[Tensor]:
        own = copy.deepcopy(model)
        sgd = torch.optim.SGD(own.parameters(), 0.1)
        opt = DistributedOptimizer(sgd, own, world=world, reproducible_terms=terms)
        for step in range(4):
            late = world.rank == 1 and step in (1, 3)
            counts = {"images": 0 if late else 5} if options["sums"] else {}

            def gradients(late: bool = late, counts: dict[str, int] = counts, step: int = step) -> Tensor:
                if options["clears"]:
                    opt.zero_grad()
                loss = torch.zeros(())
                if not late:
                    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + world.rank))
                    loss = own(x).square().mean() * (5 if counts else 1)
                    opt.backward(loss)
                if options["waits"] or (counts and not late):
                    opt.synchronize(**counts)
                change(opt, own)
                return loss

            if options["closure"]:
                opt.step(gradients, **counts)
            else:
                gradients()
                opt.step(**counts)
        return [p.detach() for p in own.parameters()]

    return together(3, or_told(run))


@pytest.mark.parametrize(
    "options", [{}, {"reproducible_terms": 8}, {"sums": True}, {"closure": True}], ids=str
)
@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("change", [by_norm, by_value, by_assignment])
def test_it_is_told_or_the_replicas_are_the_same(
    change: Callable, clears: bool, options: dict[str, Any]
) -> None:
    model = network()
    same = train(change, model, {**options, "clears": clears, "waits": True})
    for weights in same[1:]:
        torch.testing.assert_close(weights, same[0], rtol=0, atol=0)
    told = [of for of in train(change, model, {**options, "clears": clears}) if isinstance(of, str)]
    if clears or change is by_assignment:
        expected = "gradients were changed before step.* 1 of 3 processes .* call opt.synchronize"
    else:  # what rank 1 has clipped is from the step before
        expected = "gradients of the last step were changed.* call opt.synchronize"
    assert [message for message in told if re.match(expected, message)]


def test_on_gpus_the_next_exchange_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the step is not waited for, also by processes that clip in every step."""
    monkeypatch.setattr(DistributedOptimizer, "_hears_at_once", False)
    waits = list[bool]()
    wait = Arriving.wait

    def noted(arriving: Arriving[int]) -> list[int]:
        said = [of._replicas._said for of in optimizers]
        owners = [of for of in said if arriving in [one.sums for one in of]]
        waits.extend(of[-1].sums is arriving for of in owners)
        return wait(arriving)

    optimizers = list[DistributedOptimizer]()

    def clip(opt: DistributedOptimizer, model: nn.Module) -> None:
        optimizers.append(opt)
        by_norm(opt, model)

    monkeypatch.setattr(Arriving, "wait", noted)
    same = train(clip, network(), {"waits": True})
    torch.testing.assert_close(same[1], same[0], rtol=0, atol=0)
    told = [of for of in train(clip, network(), {}) if isinstance(of, str)]
    expected = (
        "2 of 3 processes have changed gradients before the last step.*their weights are no longer the same"
    )
    assert [message for message in told if re.match(expected, message)]
    assert waits
    assert not any(waits)


@pytest.mark.parametrize("options", [{}, {"reproducible_terms": 8}, {"sums": True}], ids=str)
def test_to_look_only_is_fine(options: dict[str, Any]) -> None:
    weights = train(only_read, network(), options)
    assert not any(isinstance(of, str) for of in weights)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


@pytest.mark.parametrize("synchronizes", [True, False])
@pytest.mark.parametrize("explicitly", [True, False])
@pytest.mark.parametrize(("fused", "on_device"), [(True, True), (True, False), (False, False)])
def test_a_scaler_that_looks_before_the_exchange_is_an_error(
    synchronizes: bool, explicitly: bool, fused: bool, on_device: bool
) -> None:
    """Gradients that were cleared to zeros are unscaled by it as any others, and leave no trace of that."""
    images = torch.randn(2, 6, 3)

    def run(world: Together) -> list[Tensor]:
        model = network()
        inner = SGD(model.parameters(), 0.1, fused=fused)
        opt = DistributedOptimizer(inner, model, world=world, skip_on_device=on_device)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            late = world.rank == 1 and step == 1
            opt.zero_grad(set_to_none=False)
            if late:
                scaler.scale(torch.zeros(()))
            else:
                scaler.scale(model(images[world.rank]).square().sum()).backward()
            if late and synchronizes:
                opt.synchronize()
            if explicitly:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        return [p.detach() for p in model.parameters()]

    one, other = together(2, or_told(run))
    if synchronizes:
        torch.testing.assert_close(other, one, rtol=0, atol=0)
        assert max(p.abs().max() for p in one) < 10  # not of gradients times the scale
    else:
        assert "GradScaler.step() before this process has taken part" in other
